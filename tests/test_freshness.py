"""Does the engine sample with the policy's weights: checksums bit by bit, syncs that are sabotaged, anchors that are not mu."""

from __future__ import annotations

import re
import struct
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.callbacks import AnchorGuard, WeightSyncCanary
from cppo_lightning.datamodule import RolloutDataModule
from cppo_lightning.engines.checksums import checksum, checksums
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.mismatch import USUAL_BOUNDS, GapBounds, check_staleness, coarsest
from cppo_lightning.rollout import Completion, RolloutEngine, RolloutPlan, Sampling, TransformersEngine, VLLMEngine
from cppo_lightning.verifiers import Format
from tests.callback_rig import scalars
from tests.test_fit import make_data, make_module, make_trainer, unchanged, weights

GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def slow_checksum(tensor: Tensor) -> int:
    """Word by word, in Python's integers."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    raw += bytes(-len(raw) % 4)
    words = [word for (word,) in struct.iter_unpack("<i", raw)]
    factors = [int(f) | 1 for f in np.random.PCG64(0).random_raw(2**16)]
    total = tensor.numel()
    for start in range(0, max(1, len(words)), 2**16):
        block = sum(word * factor for word, factor in zip(words[start : start + 2**16], factors, strict=False))
        total = (total * 0x9E3779B97F4A7C15 + block) % 2**64
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (7,), (4, 2, 8)], ids=str)
def test_checksum_equals_a_loop_over_words(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    assert checksum(tensor) == slow_checksum(tensor)


def test_blocks_have_places() -> None:
    tensor = torch.randn(2**16 + 5, generator=torch.Generator().manual_seed(0))
    assert checksum(tensor) == slow_checksum(tensor)
    swapped = torch.cat([tensor[2**16 :], tensor[5 : 2**16], tensor[:5]])
    assert checksum(swapped) != checksum(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_and_every_swap_shows(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 22).div(8).to(dtype)  # no two alike, but for their signs
    seen = {checksum(tensor)}
    raw = tensor.view(torch.uint8)
    for byte in range(len(raw)):
        for bit in range(8):
            other = raw.clone()
            other[byte] ^= 1 << bit
            seen.add(checksum(other.view(dtype)))
    assert len(seen) == 1 + 8 * len(raw)
    for i in range(21):
        for j in range(i):
            order = torch.arange(21)
            order[[i, j]] = order[[j, i]]
            seen.add(checksum(tensor[order]))
    for i in range(21):
        for j in range(i):
            signs = torch.ones(21)
            signs[[i, j]] = -1
            seen.add(checksum(tensor * signs.to(dtype)))
    assert len(seen) == 1 + 8 * len(raw) + 210 + 210


def test_checksum_sees_bits_and_not_how_they_lie_in_memory() -> None:
    tensor = torch.randn(6, 7, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert checksum(tensor.T.contiguous().T) == checksum(tensor)
    assert checksum(torch.cat([torch.zeros(1, dtype=torch.bfloat16), tensor.flatten()])[1:]) == checksum(tensor)
    assert checksum(torch.nn.Parameter(tensor.float())) == checksum(tensor.float())
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.zeros(3)) != checksum(torch.zeros(4))


def test_checksums_are_of_the_engines_dtype() -> None:
    named = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0 + 2**-20, 2.0])}
    wide, narrow = checksums(named.items(), torch.float32), checksums(named.items(), torch.bfloat16)
    assert wide["a"] != wide["b"]
    assert narrow["a"] == narrow["b"]


class Faulty(RolloutEngine):
    """In front of an engine: each sync after the first goes wrong in one way."""

    fault = ""
    before: Mapping[str, Tensor] = {}
    calls = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        fresh = {name: tensor.clone() for name, tensor in weights}
        given = dict(fresh)
        if self.before and self.fault == "left out":
            given[GATE] = self.before[GATE]
        elif self.before and self.fault == "one update behind":
            given = dict(self.before)
        elif self.before and self.fault == "swapped":
            given[GATE], given[UP] = fresh[UP], fresh[GATE]
        super().load_weights(given.items(), version)  # type: ignore[safe-super]
        self.before = fresh

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        self.calls += 1
        return super().generate(*args, **kwargs)  # type: ignore[safe-super]


class FaultyTransformers(Faulty, TransformersEngine): ...


class FaultyVLLM(Faulty, VLLMEngine): ...


class Silent(FaultyTransformers):
    def checksums(self) -> Any:
        return None


def run(
    path: Path,
    folder: Path,
    callbacks: list[Callback],
    data: RolloutDataModule,
    rollouts: int = 2,
    lr: float = 1e-2,
    **settings: Any,
) -> tuple[Trainer, list[Tensor]]:
    """Trains; the Trainer and the policy's weights afterwards."""
    seed_everything(0, verbose=False)
    module = make_module(path, optimizer=lambda p: torch.optim.AdamW(p, lr=lr), temperature=data.sampling.temperature)
    trainer = make_trainer(folder, callbacks, rollouts, **settings)
    trainer.fit(module, datamodule=data)
    return trainer, weights(module)


def refused(path: Path, folder: Path, data: RolloutDataModule, callback: Callback, **settings: Any) -> tuple[str, int]:
    """What the callback says, and the optimizer steps taken before it does."""
    trainer = Steps()
    with pytest.raises((RolloutError, ConfigError)) as error:
        run(path, folder, [trainer, callback], data, **settings)
    data.close()
    return str(error.value), trainer.taken


class Steps(Callback):
    taken = 0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.taken += 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_good_sync_passes_and_changes_nothing(tiny_model_path: Path, tmp_path: Path, dtype: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    with_it = make_data(tiny_model_path, engine=TransformersEngine(dtype))
    _, watched = run(tiny_model_path, tmp_path, [WeightSyncCanary(), AnchorGuard()], with_it, 3, logger=logger)
    _, alone = run(tiny_model_path, tmp_path, [], make_data(tiny_model_path, engine=TransformersEngine(dtype)), 3)
    for a, b in zip(watched, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    found = scalars(tmp_path)
    assert [step for step, _ in found["canary/logp_gap_mean"]] == [0, 2, 4]
    for tag, bound in zip(("canary/logp_gap_mean", "canary/logp_gap_max"), USUAL_BOUNDS[dtype], strict=True):
        assert all(0 < value < bound for _, value in found[tag])
    if dtype == "bfloat16":
        assert all(value > USUAL_BOUNDS["float32"][0] for _, value in found["canary/logp_gap_mean"])


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("left out", rf"Checksums differ for {GATE};"),
        ("swapped", rf"Checksums differ for {GATE}, {UP};"),
        ("one update behind", r"Checksums differ for lm_head\.weight, model\.embed_tokens\.weight, .* and 15 more;"),
    ],
)
def test_a_sabotaged_sync_stops_the_run_and_names_the_tensors(
    tiny_model_path: Path, tmp_path: Path, fault: str, named: str
) -> None:
    engine = FaultyTransformers()
    engine.fault = fault
    data = make_data(tiny_model_path, engine=engine)
    message, steps = refused(tiny_model_path, tmp_path, data, WeightSyncCanary())
    assert re.search(named, message), message
    assert "step 2: the engine does not compute with the policy's weights" in message
    assert "Nothing was trained on what it sampled" in message
    assert steps == 2


@pytest.mark.parametrize("fault", ["left out", "swapped", "one update behind"])
def test_an_engine_that_tells_no_checksums_is_caught_by_the_gap(tiny_model_path: Path, tmp_path: Path, fault: str) -> None:
    engine = Silent()
    engine.fault = fault
    message, steps = refused(tiny_model_path, tmp_path, make_data(tiny_model_path, engine=engine), WeightSyncCanary())
    assert "No parameter's checksum tells them apart" in message
    assert steps == 2


def test_in_bfloat16_a_small_update_is_caught_by_the_checksums(tiny_model_path: Path, tmp_path: Path) -> None:
    """A learning rate at which the gap of a stale engine lies within what bf16 costs anyway."""
    engine = FaultyTransformers("bfloat16")
    engine.fault = "one update behind"
    data = make_data(tiny_model_path, engine=engine)
    message, _ = refused(tiny_model_path, tmp_path, data, WeightSyncCanary(), lr=1e-5)
    assert "Checksums differ for" in message
    silent = Silent("bfloat16")
    silent.fault = "one update behind"
    data = make_data(tiny_model_path, engine=silent)
    run(tiny_model_path, tmp_path, [WeightSyncCanary()], data, lr=1e-5)
    data.close()


def test_every_nth_sync_is_checked(tiny_model_path: Path, tmp_path: Path) -> None:
    engine = FaultyTransformers()
    data = make_data(tiny_model_path, engine=engine)
    run(tiny_model_path, tmp_path, [WeightSyncCanary(every_n_syncs=2, prompts=["a b"], max_tokens=3)], data, rollouts=5)
    data.close()
    assert engine.calls == 5 + 3


class Unhurried(FaultyTransformers):
    """Draws rollouts ahead that each end after the first update of the one before."""

    concurrent = True
    aheads = 0

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        if threading.current_thread() is not threading.main_thread():
            before, limit = 2 * self.aheads, time.monotonic() + 60
            self.aheads += 1
            while self.steps.taken <= before:
                assert time.monotonic() < limit, "an update waits for the rollout ahead"
                time.sleep(0.01)
        return super().generate(*args, **kwargs)


@pytest.mark.parametrize("fault", ["", "left out"])
def test_every_sync_is_checked_while_a_rollout_is_drawn_ahead(tiny_model_path: Path, tmp_path: Path, fault: str) -> None:
    steps = Steps()
    engine = Unhurried(steps)
    engine.fault = fault
    data = make_data(tiny_model_path, engine=engine, plan=RolloutPlan(prompts=4, samples=4, updates=2, max_staleness=1))
    if fault:
        with pytest.raises(RolloutError, match=f"Checksums differ for {GATE};"):
            run(tiny_model_path, tmp_path, [steps, WeightSyncCanary()], data, rollouts=4)
        assert steps.taken == 2
    else:
        run(tiny_model_path, tmp_path, [steps, WeightSyncCanary()], data, rollouts=4)
        assert steps.taken == 8
        assert engine.calls == 4 + 3  # weights are synced for each rollout, of which the first two share theirs
    data.close()


class StaleOnRankOne(FaultyTransformers):
    @property
    def fault(self) -> str:  # type: ignore[override]
        return "left out" if torch.distributed.get_rank() == 1 else ""


class Recorded(WeightSyncCanary):
    """Writes what stopped each rank, and gives the other one time to: who ends first has the other killed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def check(self, trainer: Trainer, module: Any) -> None:
        try:
            super().check(trainer, module)
        except RolloutError as error:
            (self.folder / f"rank{trainer.global_rank}").write_text(str(error))
            deadline = time.monotonic() + 60
            while len(list(self.folder.glob("rank*"))) < trainer.world_size and time.monotonic() < deadline:
                time.sleep(0.1)
            raise


def fast_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


@pytest.mark.slow
def test_a_stale_engine_of_one_rank_stops_all(tiny_model_path: Path, tmp_path: Path) -> None:
    data = make_data(tiny_model_path, engine=StaleOnRankOne(), plan=RolloutPlan(prompts=8, samples=4, updates=2))
    module = make_module(tiny_model_path, optimizer=fast_adam)
    settings: dict[str, Any] = {"devices": 2, "strategy": "ddp_spawn", "use_distributed_sampler": False}
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_epochs=2, logger=False, callbacks=[Recorded(tmp_path)], **settings, **quiet)
    with pytest.raises(Exception, match="Checksums differ"):
        trainer.fit(module, datamodule=data)
    for rank in range(2):
        assert f"Checksums differ for {GATE};" in (tmp_path / f"rank{rank}").read_text()


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_passes_and_is_stopped_when_its_sync_is_sabotaged(smollm2_path: Path, tmp_path: Path) -> None:
    engine, canary = FaultyVLLM("float32", max_model_len=256), WeightSyncCanary()
    # hot enough that in some group only some of the four answers have an e
    plan, sampling = RolloutPlan(prompts=4, samples=4, updates=1), Sampling(max_tokens=4, temperature=2.0)
    data = make_data(smollm2_path, engine=engine, plan=plan, sampling=sampling, verifier=Format("e"))
    module = make_module(smollm2_path, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4), temperature=2.0)
    trainer = make_trainer(tmp_path, [canary, AnchorGuard()], rollouts=2)
    try:
        trainer.fit(module, datamodule=data)
        assert (trainer.global_step, engine.version) == (2, 1)
        older = engine.before  # the weights before the last step
        for engine.fault, named in (("left out", f"{GATE};"), ("swapped", f"{GATE}, {UP};"), ("one update behind", "more;")):
            engine.before = older
            engine.load_weights(module.named_weights(), 2)
            with pytest.raises(RolloutError, match=f"Checksums differ for .*{named}") as error:
                canary.check(trainer, module)
            gap = float(str(error.value).split("differ by ")[1].split(" nats")[0])
            assert gap > USUAL_BOUNDS["float32"][0], "vLLM computes with the weights that the checksums complain of"
        engine.fault = ""
        engine.load_weights(module.named_weights(), 2)
        canary.check(trainer, module)
    finally:
        data.close()


def test_staleness_is_a_hard_bound(tiny_model_path: Path) -> None:
    def batch(*versions: int) -> RolloutBatch:
        one = torch.zeros(len(versions), 1)
        return RolloutBatch(
            *(one.long(), one.bool(), one.long(), one.bool(), one, one[:, 0], one[:, 0], one[:, 0].long()),
            policy_version=torch.tensor(versions, dtype=torch.int64),
        )

    for step, update, allowed, good, bad in [
        (6, 0, 0, (6,), (5,)),
        (7, 1, 0, (6, 7), (5, 6)),
        (7, 1, 2, (4, 7), (3, 7)),
        (7, 1, 2, (7,), (8,)),
    ]:
        check_staleness(batch(*good), step, update, allowed)
        with pytest.raises(RolloutError, match=rf"step {step}, update {update} .* had seen {bad[0]} to {bad[-1]} steps"):
            check_staleness(batch(*bad), step, update, allowed)
    check_staleness(batch(), 3, 0)


class Rescored(RolloutDataModule):
    """Puts the trainer's own log-probabilities in the place of mu, as a trainer that recomputes them would."""

    def on_before_batch_transfer(self, batch: RolloutBatch, dataloader_idx: int) -> RolloutBatch:
        scored = self._trained().recompute(batch).old_logp
        assert scored is not None
        return replace(batch, rollout_logp=scored)


def rescored(path: Path) -> RolloutDataModule:
    data = make_data(path)
    data.__class__ = Rescored
    return data


class Off(TransformersEngine):
    """Reports log-probabilities that are off by ``by`` nats for every second token."""

    by = 0.01

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        passed = kwargs.pop("on_completion", None)
        completions = super().generate(*args, **kwargs)
        for place, completion in enumerate(completions):
            completion.logp = completion.logp - self.by * (torch.arange(len(completion.logp)) % 2)
            if passed is not None:
                passed(place, completion)
        return completions


class Truncating(TransformersEngine):
    """Draws from three tokens only, whatever it is asked for."""

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, *args: Any, **kwargs: Any
    ) -> list[Completion]:
        return super().generate(prompts, n, replace(sampling, top_k=3), *args, **kwargs)


def test_mu_that_is_not_the_engines_own_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    """The gap of such a run is 0, so no bound on it would notice."""
    message, steps = refused(tiny_model_path, tmp_path, rescored(tiny_model_path), AnchorGuard())
    assert "carry other log-probabilities than the engine returned" in message
    assert "model.anchor: recomputed" in message
    assert steps == 0


def test_different_temperatures_are_refused_before_the_model_is_loaded(tiny_model_path: Path, tmp_path: Path) -> None:
    data, module = make_data(tiny_model_path, sampling=Sampling(8, temperature=0.8)), make_module(tiny_model_path)
    with pytest.raises(ConfigError, match=r"data\.sampling\.temperature is 0\.8 and model\.temperature 1\.0"):
        make_trainer(tmp_path, [AnchorGuard()]).fit(module, datamodule=data)
    assert module.policy is None
    data.close()


def test_truncated_sampling_is_refused_where_it_is_set_and_where_the_engine_does_it_unasked(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.sampling is truncated"):
        make_data(tiny_model_path, sampling=Sampling(8, top_p=0.9))
    data = make_data(tiny_model_path, engine=Truncating(), top_k=0)
    seed_everything(0, verbose=False)
    from cppo_lightning.divergences import BinaryTV
    from cppo_lightning.trust_regions import CPPO

    module = make_module(tiny_model_path, trust_region=CPPO(BinaryTV()))
    with pytest.raises(RolloutError, match=r"Log mu is above log pi at 100% of the tokens, .* truncated"):
        make_trainer(tmp_path, [AnchorGuard()]).fit(module, datamodule=data)
    data.close()
    assert unchanged(module, tiny_model_path)


def test_a_gap_beyond_the_bound_stops_the_run_before_its_first_step(tiny_model_path: Path, tmp_path: Path) -> None:
    module = make_module(tiny_model_path)
    data = make_data(tiny_model_path, engine=Off())
    with pytest.raises(RolloutError, match=r"differ by 0\.005\d* nats on average \(bound 0\.0001\) and by 0\.01 at most"):
        make_trainer(tmp_path, [AnchorGuard()]).fit(module, datamodule=data)
    data.close()
    assert unchanged(module, tiny_model_path)
    allowed = make_data(tiny_model_path, engine=Off())
    trainer, _ = run(tiny_model_path, tmp_path, [AnchorGuard(max_mean_gap=0.02, max_gap=0.02)], allowed)
    allowed.close()
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("engine", "policy", "precision", "expected"),
    [
        ("float32", "float32", "32-true", "float32"),
        ("bfloat16", "float32", "32-true", "bfloat16"),
        ("float32", "float32", "bf16-mixed", "bfloat16"),
        ("float32", "float32", "16-mixed", "float16"),
        ("float16", "bfloat16", "32-true", "bfloat16"),
        ("", "float32", "32-true", "bfloat16"),
    ],
)
def test_bounds_follow_the_coarsest_dtype(engine: str, policy: str, precision: str, expected: str) -> None:
    assert coarsest(engine, policy, precision) == expected


def test_a_gap_that_is_no_number_is_beyond_every_bound() -> None:
    assert GapBounds().judge(1e-5, 1e-4, "float32")[0]
    assert not GapBounds(1e9, 1e9).judge(float("nan"), 0.0, "float32")[0]
    assert not GapBounds(1e9, 1e9).judge(0.0, float("nan"), "float32")[0]
    assert not GapBounds(largest=1e-5).judge(1e-5, 1e-4, "float32")[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WeightSyncCanary(every_n_syncs=0), "every_n_syncs must be at least 1, got 0"),
        (lambda: WeightSyncCanary(max_tokens=0), "max_tokens must be at least 1, got 0"),
        (lambda: WeightSyncCanary(prompts=[]), r"prompts must hold texts, none of them empty, got \[\]"),
        (lambda: WeightSyncCanary(max_gap=0.0), r"max_gap must be above 0 nats, .* got 0\.0"),
        (lambda: AnchorGuard(max_mean_gap=-1.0), r"max_mean_gap must be above 0 nats, .* got -1\.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
