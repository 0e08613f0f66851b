"""The whole loop on a tiny random model: staleness, skipped steps, guards, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, IterableDataset

from cppo_lightning.batch import Gate, RolloutBatch, TokenStats
from cppo_lightning.datamodule import RolloutDataModule
from cppo_lightning.divergences import BinaryTV, TopKTV
from cppo_lightning.errors import RolloutError
from cppo_lightning.losses import LossAggregation, ReferenceKL
from cppo_lightning.module import RLVRModule
from cppo_lightning.policy import PolicyConfig
from cppo_lightning.rollout import Completion, ReasoningGymPrompts, RolloutPlan, Sampling, TransformersEngine
from cppo_lightning.trust_regions import CPPO, PPOClip, TrustRegion
from cppo_lightning.verifiers import Format

SUMS = {"operators": ["+"], "allow_parentheses": False, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
HALF_THE_TIME = Format("[a-m]")  # of a random model's eight bytes


class Watch(Callback):
    """Notes what each update was given."""

    def __init__(self) -> None:
        self.versions: list[tuple[int, int, list[int]]] = []  # (optimizer steps, batch index, policy versions)
        self.ratios: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        self.versions.append((trainer.global_step, batch_idx, batch.policy_version.unique().tolist()))

    def on_gate(self, trainer: Trainer, pl_module: Any, stats: TokenStats, gate: Gate) -> None:
        self.ratios.append(float((stats.ratio - 1).abs().max()))


def make_data(path: Path, **settings: Any) -> RolloutDataModule:
    defaults: dict[str, Any] = {
        "prompts": ReasoningGymPrompts("basic_arithmetic", 200, params=SUMS),
        "verifier": HALF_THE_TIME,
        "plan": RolloutPlan(prompts=4, samples=4, updates=2),
        "sampling": Sampling(max_tokens=8),
        "engine": TransformersEngine(),
        "top_k": 5,
    }
    return RolloutDataModule(str(path), **{**defaults, **settings})


def make_module(path: Path, **settings: Any) -> RLVRModule:
    defaults: dict[str, Any] = {
        "trust_region": CPPO(TopKTV(5)),
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "micro_batch_tokens": 400,
    }
    return RLVRModule(PolicyConfig(str(path)), **{**defaults, **settings})


def make_trainer(tmp_path: Path, callbacks: list[Callback], rollouts: int = 3, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=rollouts,
        default_root_dir=tmp_path,
        callbacks=callbacks,
        **{**quiet, **settings},
    )


def fit(
    tmp_path: Path, module: RLVRModule, data: RolloutDataModule, rollouts: int = 3, **settings: Any
) -> tuple[Trainer, Watch]:
    seed_everything(0, verbose=False)
    watch = Watch()
    trainer = make_trainer(tmp_path, [watch], rollouts, **settings)
    try:
        trainer.fit(module, datamodule=data)
    finally:
        data.close()
    return trainer, watch


def weights(module: RLVRModule) -> list[torch.Tensor]:
    return [w.clone() for _, w in module.named_weights()]


def initial_weights(path: Path) -> list[torch.Tensor]:
    module = make_module(path)
    module.configure_model()
    return weights(module)


def unchanged(module: RLVRModule, path: Path) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(module), initial_weights(path), strict=True))


def is_exact(watch: Watch) -> bool:
    """Every update's samples come from the weights of its rollout's start, which are ``batch_idx`` steps old."""
    return all(versions == [step - index] for step, index, versions in watch.versions)


def test_policy_version_is_the_number_of_steps_taken_when_sampling(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer, watch = fit(tmp_path, make_module(tiny_model_path), make_data(tiny_model_path))
    assert trainer.global_step == 6
    assert [step for step, _, _ in watch.versions] == list(range(6))
    assert is_exact(watch)


class WithoutLength(IterableDataset[RolloutBatch]):
    def __init__(self, loaders: Callable[[], DataLoader[RolloutBatch]], rollouts: int) -> None:
        self.loader, self.rollouts = loaders(), rollouts

    def __iter__(self) -> Any:
        for _ in range(self.rollouts):
            yield from self.loader


def test_the_check_above_sees_a_prefetched_rollout(tiny_model_path: Path, tmp_path: Path) -> None:
    """One endless epoch without a length, which Lightning prefetches: rollouts come from weights one step old."""
    data = make_data(tiny_model_path)
    original = data.train_dataloader
    data.train_dataloader = lambda: DataLoader(WithoutLength(original, 3), batch_size=None)  # type: ignore[method-assign]
    _, watch = fit(tmp_path, make_module(tiny_model_path), data, rollouts=1)
    exact = [versions == [2 * (step // 2)] for step, _, versions in watch.versions]
    assert exact == [True, True, False, False, False, False]


def test_the_engine_samples_with_the_policys_own_weights(tiny_model_path: Path, tmp_path: Path) -> None:
    _, watch = fit(tmp_path, make_module(tiny_model_path, micro_batch_tokens=10_000), make_data(tiny_model_path))
    # 1e-4: two float32 implementations of the same softmax, in nats; a stale engine is at the size of the second update's
    assert all(gap < 1e-4 for gap in watch.ratios[::2])
    assert all(gap > 1e-2 for gap in watch.ratios[1::2])


@pytest.mark.parametrize("kind", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_micro_batches_change_no_weight(tiny_model_path: Path, tmp_path: Path, kind: str) -> None:
    results = []
    for tokens in (1, 300, 100_000):
        module = make_module(
            tiny_model_path,
            micro_batch_tokens=tokens,
            aggregation=LossAggregation(kind, 8 if kind.endswith("norm") else None),  # type: ignore[arg-type]
            optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
            trust_region=PPOClip(),
        )
        fit(tmp_path, module, make_data(tiny_model_path), rollouts=1)
        results.append(weights(module))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_weights(tiny_model_path: Path, tmp_path: Path) -> None:
    modules = [make_module(tiny_model_path) for _ in range(2)]
    for module in modules:
        fit(tmp_path, module, make_data(tiny_model_path, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(weights(modules[0]), weights(modules[1]), strict=True))
    assert not unchanged(modules[0], tiny_model_path)


def test_groups_of_zero_spread_take_no_step_and_say_so(tiny_model_path: Path, tmp_path: Path) -> None:
    module = make_module(tiny_model_path)
    with pytest.warns(UserWarning, match="all rewards are equal, so it teaches nothing and no step is taken"):
        trainer, _ = fit(tmp_path, module, make_data(tiny_model_path, verifier=Format("")))
    assert trainer.global_step == 0
    assert unchanged(module, tiny_model_path)


@dataclass(frozen=True)
class Poison(TrustRegion):
    """Gives one token a gradient that is no number."""

    def __call__(self, stats: TokenStats) -> Gate:
        weight = stats.ratio * stats.mask
        weight[0, 0] = float("nan")
        return Gate(weight, stats.mask)


def test_a_nan_gradient_never_reaches_the_weights(tiny_model_path: Path, tmp_path: Path) -> None:
    module = make_module(tiny_model_path, trust_region=Poison())
    with pytest.warns(UserWarning, match="no step was taken"):
        trainer, _ = fit(tmp_path, module, make_data(tiny_model_path))
    assert trainer.global_step == 0
    assert unchanged(module, tiny_model_path)


class Forgetful(TransformersEngine):
    """Loses the last log-probability of its third answer."""

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        completions = super().generate(*args, **kwargs)
        completions[2].logp = completions[2].logp[:-1]
        return completions


class Broken(TransformersEngine):
    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        completions = super().generate(*args, **kwargs)
        completions[2].logp = completions[2].logp * float("nan")
        return completions


@pytest.mark.parametrize(("engine", "message"), [(Forgetful(), "tokens with"), (Broken(), "non-finite log-probability")])
def test_bad_engine_answers_stop_the_run_with_the_prompts_id(
    tiny_model_path: Path, tmp_path: Path, engine: TransformersEngine, message: str
) -> None:
    module = make_module(tiny_model_path)
    with pytest.raises(RolloutError, match=f"prompt 'basic_arithmetic-.*{message}"):
        fit(tmp_path, module, make_data(tiny_model_path, engine=engine))
    assert unchanged(module, tiny_model_path)


def test_the_reference_is_loaded_only_when_used_and_stays_out_of_checkpoints(tiny_model_path: Path, tmp_path: Path) -> None:
    plain = make_module(tiny_model_path)
    plain.configure_model()
    assert plain.reference is None
    module = make_module(tiny_model_path, reference_kl=ReferenceKL(0.1, "k3"))
    trainer, _ = fit(tmp_path, module, make_data(tiny_model_path), rollouts=2)
    assert module.reference is not None
    assert all(
        torch.equal(a, b)
        for a, b in zip([w for _, w in module.reference.named_weights()], initial_weights(tiny_model_path), strict=True)
    )
    assert float(trainer.callback_metrics["train/reference_kl"]) > 0
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if name.startswith("reference")]
    again = make_module(tiny_model_path, reference_kl=ReferenceKL(0.1, "k3"))
    resumed = make_trainer(tmp_path, [], rollouts=2)
    data = make_data(tiny_model_path)
    resumed.fit(again, datamodule=data, ckpt_path=tmp_path / "model.ckpt", weights_only=True)
    data.close()
    assert all(torch.equal(a, b) for a, b in zip(weights(module), weights(again), strict=True))


def test_reference_kl_pulls_back(tiny_model_path: Path, tmp_path: Path) -> None:
    distances = []
    for penalty in (None, ReferenceKL(10.0, "k2")):
        module = make_module(tiny_model_path, reference_kl=penalty, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        fit(tmp_path, module, make_data(tiny_model_path), rollouts=4)
        distances.append(
            sum(float((a - b).square().sum()) for a, b in zip(weights(module), initial_weights(tiny_model_path), strict=True))
        )
    assert distances[1] < distances[0]


def test_a_run_resumes_with_the_next_prompts_and_the_same_weights(tiny_model_path: Path, tmp_path: Path) -> None:
    whole = make_module(tiny_model_path)
    fit(tmp_path, whole, make_data(tiny_model_path), rollouts=4)
    half = make_module(tiny_model_path)
    trainer, _ = fit(tmp_path, half, make_data(tiny_model_path), rollouts=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = make_module(tiny_model_path)
    watch, data = Watch(), make_data(tiny_model_path)
    resumed = make_trainer(tmp_path, [watch], rollouts=4)
    resumed.fit(again, datamodule=data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    data.close()
    assert [step for step, _, _ in watch.versions] == [4, 5, 6, 7]
    for a, b in zip(weights(whole), weights(again), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_learning_rate_schedules_move_with_the_steps(tiny_model_path: Path, tmp_path: Path) -> None:
    module = make_module(tiny_model_path, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5))
    trainer, _ = fit(tmp_path, module, make_data(tiny_model_path), rollouts=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**4)


def test_gradient_checkpointing_trains_the_same(tiny_model_path: Path, tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        module = make_module(tiny_model_path)
        module.policy_config = PolicyConfig(str(tiny_model_path), gradient_checkpointing=checkpointing)
        fit(tmp_path, module, make_data(tiny_model_path), rollouts=1)
        results.append(weights(module))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trust_region", [CPPO(BinaryTV()), PPOClip()])
def test_no_top_k_where_none_is_read(tiny_model_path: Path, tmp_path: Path, trust_region: TrustRegion) -> None:
    assert trust_region.top_k == 0
    trainer, _ = fit(tmp_path, make_module(tiny_model_path, trust_region=trust_region), make_data(tiny_model_path, top_k=0))
    assert trainer.global_step == 6
