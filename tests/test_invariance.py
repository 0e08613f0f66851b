"""One global batch gives the same gradients, masks and metrics, however it is spread over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from cppo_lightning.batch import Gate, RolloutBatch, TokenStats
from cppo_lightning.callbacks import BudgetExhaustion, Divergence, MaskRate
from cppo_lightning.divergences import TopKTV
from cppo_lightning.losses import LossAggregation, ReferenceKL
from cppo_lightning.module import RLVRModule
from cppo_lightning.policy_config import PolicyConfig
from cppo_lightning.ranks import data_share
from cppo_lightning.strategies import FSDP2
from cppo_lightning.trust_regions import CPPO
from tests.rank_rig import on_ranks

PROMPTS = [5, 40, 12, 3, 28, 9, 17, 33, 8, 21, 14, 6]
RESPONSES = [60, 1, 118, 25, 77, 90, 8, 44, 31, 103, 2, 66]
UPDATES = 2
TIMES = {"train/tokens_per_second"}


@dataclass(frozen=True)
class Case:
    """One way to train on the batch.

    Args:
        ranks: processes.
        strategy: makes the Trainer's strategy.
        tokens: budget of a micro-batch.
        order: seed of the order of rows; None leaves them.
        padding: columns without tokens around all rows.
        parts: rows of each rank, in sixths; what is left goes to the last.
        masked: rows that each rank has besides, all of whose tokens are masked.
        aggregation: of token losses.
    """

    ranks: int
    strategy: Callable[[], Any]
    tokens: int
    order: int | None = None
    padding: int = 0
    parts: tuple[int, ...] = ()
    masked: int = 0
    aggregation: Any = "token-mean"


@dataclass(frozen=True)
class Seen:
    """What one rank saw."""

    gradients: list[dict[str, Tensor]]  # per update, whole, after clipping
    masks: list[dict[tuple[int, ...], tuple[list[bool], list[float]]]]  # per update: response -> keep, weight
    metrics: list[dict[str, float]]  # per update
    reductions: list[list[bool]]  # per update: of each micro-batch, whether DDP averages gradients over ranks after it


class Notes(Callback):
    """Writes down gates and metrics."""

    def __init__(self) -> None:
        self.masks: list[Any] = [{}]
        self.metrics: list[dict[str, float]] = []
        self.reductions: list[list[bool]] = [[]]

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        self.reductions[-1].append(getattr(trainer.strategy.model, "require_backward_grad_sync", False))

    def on_gate(self, trainer: Trainer, pl_module: Any, stats: TokenStats, gate: Gate) -> None:
        for row, mask in enumerate(stats.mask):
            if mask.any():
                response = tuple(stats.response_ids[row][mask].tolist())
                self.masks[-1][response] = (gate.keep[row][mask].tolist(), gate.weight[row][mask].tolist())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.masks.append({})
        self.reductions.append([])
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Recording(torch.optim.SGD):
    """Keeps the whole gradients of each step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.3)
        self.gradients: list[dict[str, Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        found = [p.grad for group in self.param_groups for p in group["params"]]
        self.gradients.append({str(i): (g.full_tensor() if isinstance(g, DTensor) else g).clone() for i, g in enumerate(found)})
        super().step(closure)


@pytest.fixture(scope="module")
def batches(tiny_model_path: Path) -> list[RolloutBatch]:
    """Random rows under a mu that is the tiny model's distribution with noise, so that the trust region decides."""
    model, generator = AutoModelForCausalLM.from_pretrained(tiny_model_path), torch.Generator().manual_seed(0)
    rows, columns, k = len(PROMPTS), max(RESPONSES), 5

    def one() -> RolloutBatch:
        prompt_ids, response_ids = (
            torch.randint(3, 200, (rows, width), generator=generator) for width in (max(PROMPTS), columns)
        )
        prompt_mask = torch.arange(max(PROMPTS) - 1, -1, -1) < torch.tensor(PROMPTS)[:, None]
        response_mask = torch.arange(columns) < torch.tensor(RESPONSES)[:, None]
        ids, attended = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1).long()
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=attended, position_ids=positions).logits[:, -columns - 1 : -1]
        log_mu = (logits + torch.randn(logits.shape, generator=generator)).log_softmax(-1)
        top = log_mu.topk(k)
        return RolloutBatch(
            prompt_ids,
            prompt_mask,
            response_ids,
            response_mask,
            rollout_logp=log_mu.gather(-1, response_ids[..., None]).squeeze(-1) * response_mask,
            advantages=torch.randn(rows, generator=generator),
            rewards=torch.zeros(rows),
            group=torch.arange(rows),
            policy_version=torch.zeros(rows, dtype=torch.long),
            topk_ids=top.indices,
            topk_rollout_logp=top.values,
        )

    return [one() for _ in range(UPDATES)]


def share(batch: RolloutBatch, case: Case, rank: int, ranks: int) -> RolloutBatch:
    """The rows of one rank, with padding around them."""
    rows = len(batch)
    generator = torch.Generator().manual_seed(case.order or 0)
    order = torch.arange(rows) if case.order is None else torch.randperm(rows, generator=generator)
    sizes = [rows * part // 6 for part in case.parts] or [rows // ranks] * ranks
    start = sum(sizes[:rank])
    own = batch.select(torch.cat([order[start : start + sizes[rank]], order[: case.masked]]))
    own.response_mask[sizes[rank] :] = False
    if not case.padding or not len(own):
        return own
    pad = torch.nn.functional.pad
    left = {name: pad(getattr(own, name), (case.padding, 0)) for name in ("prompt_ids", "prompt_mask")}
    right = {name: pad(getattr(own, name), (0, case.padding)) for name in ("response_ids", "response_mask", "rollout_logp")}
    topk = {name: pad(getattr(own, name), (0, 0, 0, case.padding)) for name in ("topk_ids", "topk_rollout_logp")}
    return replace(own, **left, **right, **topk)


def train(model: str, batches: list[RolloutBatch], cases: list[Case], folder: str) -> list[Seen]:
    """Runs on each rank."""
    return [train_once(model, batches, case, folder) for case in cases]


def train_once(model: str, batches: list[RolloutBatch], case: Case, folder: str) -> Seen:
    made: list[Recording] = []

    def optimizer(parameters: Any) -> Recording:
        made.append(Recording(parameters))
        return made[0]

    module = RLVRModule(
        PolicyConfig(model),
        CPPO(TopKTV(5), delta=0.22, delta_b=0.14, adaptive=False),
        optimizer,
        aggregation=LossAggregation(case.aggregation),
        reference_kl=ReferenceKL(0.1),
        micro_batch_tokens=case.tokens,
        max_grad_norm=0.1,
    )
    notes = Notes()
    trainer = Trainer(
        accelerator="cpu",
        devices=case.ranks,
        strategy=case.strategy(),
        max_epochs=1,
        callbacks=[MaskRate(), BudgetExhaustion(), Divergence(), notes],
        default_root_dir=folder,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    class Shares(torch.utils.data.Dataset[RolloutBatch]):
        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, update: int) -> RolloutBatch:
            return share(batches[update], case, *data_share(trainer))

    trainer.fit(module, DataLoader(Shares(), batch_size=None))
    assert trainer.global_step == UPDATES
    return Seen(made[0].gradients, notes.masks[:UPDATES], notes.metrics, notes.reductions[:UPDATES])


@pytest.fixture(scope="module")
def expected(tiny_model_path: Path, batches: list[RolloutBatch], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """One process, one micro-batch, for each aggregation."""
    kinds = ("token-mean", "seq-mean-token-mean")
    cases = [Case(1, single, 10**6, aggregation=kind) for kind in kinds]
    (seen,) = on_ranks(1, train, str(tiny_model_path), batches, cases, str(tmp_path_factory.mktemp("runs")))
    return dict(zip(kinds, seen, strict=True))


def hybrid() -> FSDP2:
    return FSDP2(replicas=2)


def tensor_parallel() -> FSDP2:
    return FSDP2(tensor_parallel_size=2)


def hybrid_tensor_parallel() -> FSDP2:
    return FSDP2(replicas=2, tensor_parallel_size=2)


def ddp() -> str:
    return "ddp"


def single() -> str:
    return "auto"


CASES = [
    *(Case(1, single, tokens, order=3) for tokens in (256, 1024, 4096)),
    Case(1, single, 300, padding=7, aggregation="seq-mean-token-mean"),
    Case(1, FSDP2, 1024),
    Case(1, single, 1, masked=3),
    *(Case(2, strategy, tokens) for strategy in (ddp, FSDP2) for tokens in (256, 1024, 4096)),
    Case(2, FSDP2, 256, order=5, padding=3, parts=(5, 1), aggregation="seq-mean-token-mean"),
    Case(2, ddp, 256, order=4, parts=(6, 0)),
    Case(2, FSDP2, 256, order=4, parts=(6, 0), masked=2),
    *(Case(4, strategy, tokens, order=1) for strategy in (ddp, FSDP2) for tokens in (256, 4096)),
    Case(4, FSDP2, 512, order=2, parts=(3, 0, 2, 1)),
    Case(4, hybrid, 512),
    Case(2, tensor_parallel, 512, order=6),
    Case(4, tensor_parallel, 256, order=7, padding=2, parts=(4, 2), aggregation="seq-mean-token-mean"),
    Case(4, hybrid_tensor_parallel, 512),
]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_masks_and_metrics_do_not_depend_on_how_a_batch_is_spread(
    ranks: int, tiny_model_path: Path, batches: list[RolloutBatch], expected: dict[str, Seen], tmp_path: Path
) -> None:
    cases = [case for case in CASES if case.ranks == ranks]
    found = on_ranks(ranks, train, str(tiny_model_path), batches, cases, str(tmp_path))
    for i, case in enumerate(cases):
        assert_same([seen[i] for seen in found], expected[case.aggregation], case)
        if case.strategy is ddp:
            assert_reduced_once([seen[i] for seen in found], several=case.tokens == 256)


def assert_reduced_once(seen: list[Seen], several: bool) -> None:
    """Gradients go over the network once in each step, after its last micro-batch; ``several``: there are more than one."""
    for rank in seen:
        for parts in rank.reductions:
            assert parts == [False] * (len(parts) - 1) + [True]
            assert len(parts) > 1 or not several


def assert_same(seen: list[Seen], expected: Seen, case: Case) -> None:
    for update in range(UPDATES):
        wanted = expected.gradients[update]
        for rank in seen:
            assert rank.gradients[update].keys() == wanted.keys()
            for name, gradient in rank.gradients[update].items():
                # relative to the parameter's largest entry: entries near 0 are sums of what cancels
                gap = float((gradient - wanted[name]).abs().max() / wanted[name].abs().max())
                assert gap < 1e-5, (case, update, name, gap)
            assert rank.metrics[update].keys() == expected.metrics[update].keys()
            for tag in rank.metrics[update].keys() - TIMES:
                assert rank.metrics[update][tag] == pytest.approx(expected.metrics[update][tag], rel=1e-5, abs=1e-7), (
                    case,
                    tag,
                )
        masks = {response: value for rank in seen for response, value in rank.masks[update].items()}
        assert masks.keys() == expected.masks[update].keys()
        for response, (keep, weight) in expected.masks[update].items():
            assert masks[response][0] == keep, case
            assert masks[response][1] == pytest.approx(weight, rel=1e-4), case


def test_the_batch_is_one_that_could_differ(expected: dict[str, Seen]) -> None:
    """Some tokens are masked, the two steps differ, and gradients are clipped."""
    for seen in expected.values():
        for metrics in seen.metrics:
            assert metrics["mask/by_position"] > 0.01
            assert metrics["mask/by_budget"] > 0.02
            assert metrics["mask/rate"] < 0.9
            assert metrics["train/grad_norm"] > 0.1
            assert 0 < metrics["budget/exhausted_share"] < 1
        assert seen.metrics[1]["train/reference_kl"] > 0
        norm = torch.stack([g.norm() for g in seen.gradients[0].values()]).norm()
        torch.testing.assert_close(norm, torch.tensor(0.1))
    one, other = expected.values()
    assert any(not torch.allclose(one.gradients[0][name], g, rtol=1e-3) for name, g in other.gradients[0].items())
