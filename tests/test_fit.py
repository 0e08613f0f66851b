"""The whole loop on a tiny random model: staleness, skipped steps, guards, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, IterableDataset

from cppo_lightning.batch import Gate, RolloutBatch, TokenStats
from cppo_lightning.datamodule import RolloutDataModule
from cppo_lightning.divergences import BinaryTV, TopKTV
from cppo_lightning.engines.engine import OnCompletion
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.losses import LossAggregation, ReferenceKL
from cppo_lightning.mismatch import MismatchCorrection, RecomputedBatch, TokenMask, TruncatedImportance
from cppo_lightning.module import RLVRModule
from cppo_lightning.policy import Policy, PolicyConfig
from cppo_lightning.rollout import Completion, ReasoningGymPrompts, RolloutPlan, Sampling, TransformersEngine
from cppo_lightning.trust_regions import CPPO, FixedHorizonCPPO, PPOClip, TrustRegion
from cppo_lightning.verifiers import Format
from cppo_lightning.verifiers.overlong import Overlong
from tests.test_batch import make_batch

SUMS = {"operators": ["+"], "allow_parentheses": False, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
HALF_THE_TIME = Format("[a-m]")  # of a random model's eight bytes


class Watch(Callback):
    """Notes what each update was given."""

    def __init__(self) -> None:
        self.versions: list[tuple[int, int, list[int]]] = []  # (optimizer steps, batch index, policy versions)
        self.ratios: list[float] = []
        self.gates: list[int] = []  # seen until the end of each update

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        self.versions.append((trainer.global_step, batch_idx, batch.policy_version.unique().tolist()))

    def on_gate(self, trainer: Trainer, pl_module: Any, stats: TokenStats, gate: Gate) -> None:
        self.ratios.append(float((stats.ratio - 1).abs().max()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int) -> None:
        self.gates.append(len(self.ratios))


def make_data(path: Path, **settings: Any) -> RolloutDataModule:
    defaults: dict[str, Any] = {
        "prompts": ReasoningGymPrompts("basic_arithmetic", 200, params=SUMS),
        "verifier": HALF_THE_TIME,
        "plan": RolloutPlan(prompts=4, samples=4, updates=2),
        "sampling": Sampling(max_tokens=8),
        "engine": TransformersEngine(),
        "top_k": 5,
        "seed": 2,  # with which every update has groups to train on
    }
    return RolloutDataModule(str(path), **{**defaults, **settings})


def make_module(path: Path, **settings: Any) -> RLVRModule:
    defaults: dict[str, Any] = {
        "trust_region": CPPO(TopKTV(5)),
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "micro_batch_tokens": 400,
    }
    return RLVRModule(PolicyConfig(str(path)), **{**defaults, **settings})


def make_trainer(tmp_path: Path, callbacks: list[Callback], rollouts: int = 3, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": rollouts,
        "default_root_dir": tmp_path,
        **quiet,
    }
    return Trainer(callbacks=callbacks, **{**defaults, **settings})


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


def test_a_prefetched_rollout_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    """One endless epoch without a length, which Lightning prefetches: the second rollout comes from weights one step old."""
    data = make_data(tiny_model_path)
    original = data.train_dataloader
    data.train_dataloader = lambda: DataLoader(WithoutLength(original, 3), batch_size=None)  # type: ignore[method-assign]
    with pytest.raises(RolloutError, match=r"step 2, update 0 of its rollout: .* had seen 1 to 1 steps, allowed are 2 to 2"):
        fit(tmp_path, make_module(tiny_model_path), data, rollouts=1)


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


class Spoiling(TransformersEngine):
    """Hands out a third answer that lacks the last log-probability, or has none that is a number."""

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.spoil = spoil

    def generate(self, *args: Any, on_completion: OnCompletion | None = None, **kwargs: Any) -> list[Completion]:
        def spoiled(place: int, completion: Completion) -> None:
            if place == 2:
                completion.logp = self.spoil(completion.logp)
            if on_completion is not None:
                on_completion(place, completion)

        return super().generate(*args, on_completion=spoiled, **kwargs)


class Afterwards(TransformersEngine):
    """Changes its mind about the third answer when all have been handed out."""

    def __init__(self, change: Callable[[Completion], Completion]) -> None:
        super().__init__()
        self.change = change

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        completions = super().generate(*args, **kwargs)
        completions[2] = self.change(completions[2])
        return completions


def spoil_logp(completion: Completion) -> Completion:
    completion.logp = completion.logp / 0
    return completion


def round_logp(completion: Completion) -> Completion:
    completion.logp = completion.logp.bfloat16()
    return completion


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Spoiling(lambda logp: logp[:-1]), "tokens with"),
        (Spoiling(lambda logp: logp * float("nan")), "non-finite log-probability"),
        (Afterwards(replace), "Afterwards returned another response than it handed to on_completion"),
        (Afterwards(spoil_logp), "non-finite log-probability"),
        (Afterwards(round_logp), r"log-probabilities in torch\.bfloat16"),
    ],
)
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


def test_a_run_resumes_on_its_own_problems_only(tiny_model_path: Path, tmp_path: Path) -> None:
    first = make_data(tiny_model_path)
    trainer, _ = fit(tmp_path, make_module(tiny_model_path), first, rollouts=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")

    def resume(**settings: Any) -> RolloutDataModule:
        data = make_data(tiny_model_path, prompts=ReasoningGymPrompts("basic_arithmetic", 100, params=SUMS), **settings)
        run = make_trainer(tmp_path, [], rollouts=2)
        try:
            run.fit(make_module(tiny_model_path), datamodule=data, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
        finally:
            data.close()
        return data

    with pytest.raises(ConfigError, match=rf"fingerprint {first.fingerprint}, these have .*allow_other_data: true"):
        resume()
    other = resume(allow_other_data=True)
    assert other.fingerprint != first.fingerprint
    assert other.progress is not None
    assert other.progress.rollouts.position == 8, "one rollout of four problems before, one after"


def test_learning_rate_schedules_move_with_the_steps(tiny_model_path: Path, tmp_path: Path) -> None:
    module = make_module(tiny_model_path, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5))
    trainer, _ = fit(tmp_path, module, make_data(tiny_model_path), rollouts=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**4)


def test_a_schedule_that_waits_for_a_metric_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    module = make_module(tiny_model_path, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ConfigError, match=r"model\.lr_scheduler: ReduceLROnPlateau waits for a metric"):
        fit(tmp_path, module, make_data(tiny_model_path), rollouts=1)


def test_strategies_that_weights_cannot_be_had_from_are_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    module = make_module(tiny_model_path)
    module.trainer = make_trainer(tmp_path, [], strategy=ModelParallelStrategy())
    with pytest.raises(ConfigError, match=r"trainer\.strategy is Lightning's ModelParallelStrategy"):
        module.setup("fit")
    assert module.policy is None  # nothing was loaded


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


@dataclass(frozen=True)
class DecoupledClip(PPOClip):
    """Notes what it is given: log pi and what the ratio starts at, of the trainable tokens."""

    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __call__(self, stats: TokenStats) -> Gate:
        self.seen.append((stats.logp[stats.mask], stats.rollout_logp[stats.mask]))
        return super().__call__(stats)


class Understating(TransformersEngine):
    """Reports a quarter of each probability, so that pi_old / mu is 4."""

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        completions = super().generate(*args, **kwargs)
        for completion in completions:
            completion.logp = completion.logp - torch.tensor(4.0).log()
        return completions


class Batches(Callback):
    def __init__(self) -> None:
        self.seen: list[RolloutBatch] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        self.seen.append(batch)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_no_precision_rounds_what_the_engine_reported(tiny_model_path: Path, tmp_path: Path, precision: Any) -> None:
    batches, data = Batches(), make_data(tiny_model_path)
    make_trainer(tmp_path, [batches], rollouts=1, precision=precision).fit(make_module(tiny_model_path), datamodule=data)
    data.close()
    assert data.rollout is not None
    for batch in batches.seen:
        assert batch.sample is not None
        for row, place in enumerate(batch.sample.tolist()):
            reported = data.rollout.samples[place].completion
            assert torch.equal(batch.rollout_logp[row, : len(reported.ids)], reported.logp)
        assert batch.topk_rollout_logp is not None
        assert {t.dtype for t in (batch.rollout_logp, batch.topk_rollout_logp, batch.advantages)} == {torch.float32}


class Gates(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[TokenStats, Gate]] = []

    def on_gate(self, trainer: Trainer, pl_module: Any, stats: TokenStats, gate: Gate) -> None:
        self.seen.append((stats, gate))


@pytest.mark.parametrize("region", [CPPO(BinaryTV()), FixedHorizonCPPO(BinaryTV(), horizon=3000)])
def test_bf16_true_rounds_the_weights_alone(region: TrustRegion, tiny_model_path: Path, tmp_path: Path) -> None:
    module, gates = make_module(tiny_model_path, trust_region=region, reference_kl=ReferenceKL(0.1)), Gates()
    batch = replace(make_batch([5, 9], [2000, 1500]), policy_version=torch.zeros(2, dtype=torch.long))
    trainer = make_trainer(tmp_path, [gates], rollouts=1, precision="bf16-true")
    trainer.fit(module, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    assert trainer.global_step == 1
    fresh = Policy.load(PolicyConfig(str(tiny_model_path), dtype="bfloat16"))
    for policy in (module.policy, module.reference):
        assert policy is not None
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
        for (name, ours), (_, expected) in zip(policy.named_buffers(), fresh.named_buffers(), strict=True):
            assert ours.dtype == expected.dtype == torch.float32, name
            assert torch.equal(ours, expected), name
    for stats, gate in gates.seen:
        expected = region(stats)  # by default tensors are float32 here
        for ours, theirs in ((gate.keep, expected.keep), (gate.weight, expected.weight)):
            assert torch.equal(ours, theirs)
        for name, value in expected.diagnostics.items():
            assert torch.equal(gate.diagnostics[name], value), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_recomputed_anchor_is_the_policy_at_the_rollouts_start(
    tiny_model_path: Path, tmp_path: Path, precision: str
) -> None:
    clip = DecoupledClip()
    module = make_module(tiny_model_path, trust_region=clip, anchor="recomputed", micro_batch_tokens=50)
    data = make_data(tiny_model_path, engine=Understating(), top_k=0)
    _, watch = fit(tmp_path, module, data, rollouts=1, precision=precision)
    count = watch.gates[0]  # micro-batches of the first update
    assert 1 < count < len(clip.seen) - 1
    # the same weights, micro-batches and precision: not close, but equal
    assert all(torch.equal(logp, old) for logp, old in clip.seen[:count])
    assert all(float((logp - old).abs().max()) > 1e-2 for logp, old in clip.seen[count:])
    # callbacks are shown mu: 4 - 1, up to bf16's precision
    assert watch.ratios[0] == pytest.approx(3, abs=0.5 if precision == "bf16-mixed" else 1e-3)


def test_the_second_updates_anchor_is_not_the_second_updates_policy(tiny_model_path: Path, tmp_path: Path) -> None:
    module = make_module(tiny_model_path, trust_region=DecoupledClip(), anchor="recomputed")
    batches, data = Batches(), make_data(tiny_model_path, top_k=0)
    seed_everything(0, verbose=False)
    make_trainer(tmp_path, [batches], rollouts=1).fit(module, datamodule=data)
    data.close()
    initial = make_module(tiny_model_path)
    initial.configure_model()
    assert initial.policy is not None
    assert len(batches.seen) == 2
    for batch in batches.seen:
        assert isinstance(batch, RecomputedBatch)
        with torch.no_grad():
            expected = initial.policy(batch, 1.0).logp
        torch.testing.assert_close(batch.old_logp, expected, rtol=1e-5, atol=1e-5)


def gradient_norm(path: Path, tmp_path: Path, mismatch: MismatchCorrection | None) -> float:
    """Of the only update, at which pi is pi_old, so that nothing is clipped."""
    module = make_module(path, trust_region=DecoupledClip(), anchor="recomputed", mismatch=mismatch)
    data = make_data(path, engine=Understating(), top_k=0, plan=RolloutPlan(4, 4, 1))
    trainer, _ = fit(tmp_path, module, data, rollouts=1)
    return float(trainer.callback_metrics["train/grad_norm"])


def test_a_mismatch_correction_scales_the_gradient(tiny_model_path: Path, tmp_path: Path) -> None:
    """The engine's probabilities are a quarter of the policy's, so every token's w is 4."""
    plain = gradient_norm(tiny_model_path, tmp_path, None)
    assert plain > 0
    for correction, factor in ((TruncatedImportance(2.0), 2.0), (TokenMask(0.5, 5.0), 4.0), (TokenMask(0.0, 2.0), 0.0)):
        scaled = gradient_norm(tiny_model_path, tmp_path, correction)
        assert scaled == pytest.approx(factor * plain, rel=1e-4, abs=1e-9)


def test_corrections_are_not_stacked_on_ratios_that_start_at_mu(tiny_model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.mismatch = TruncatedImportance"):
        make_module(tiny_model_path, mismatch=TruncatedImportance())
    with pytest.raises(ConfigError, match=r"model\.anchor = recomputed .* CPPO"):
        make_module(tiny_model_path, anchor="recomputed", mismatch=TruncatedImportance())


def test_refills_fill_the_minibatches_and_a_run_with_them_resumes(tiny_model_path: Path, tmp_path: Path) -> None:
    """Of two samples of a random model half the groups have no spread."""

    def data(**settings: Any) -> RolloutDataModule:
        return make_data(tiny_model_path, plan=RolloutPlan(prompts=4, samples=2, updates=2, max_refills=20), **settings)

    whole, batches = make_module(tiny_model_path), Batches()
    seed_everything(0, verbose=False)
    refilling = data()
    make_trainer(tmp_path, [batches], rollouts=3).fit(whole, datamodule=refilling)
    refilling.close()
    assert [len(batch) for batch in batches.seen] == [4] * 6
    assert refilling.progress is not None
    assert refilling.progress.rollouts.position == 12
    assert refilling.rollout is not None
    assert len(refilling.rollout.groups()) > 4, "a run without a refill tests nothing"
    half = make_module(tiny_model_path)
    trainer, _ = fit(tmp_path, half, data(), rollouts=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again, resumed = make_module(tiny_model_path), data()
    make_trainer(tmp_path, [], rollouts=3).fit(again, datamodule=resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    resumed.close()
    for a, b in zip(weights(whole), weights(again), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_penalty_that_no_response_can_reach_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.overlong\.max_tokens = 9 is more than data\.sampling\.max_tokens = 8"):
        make_data(tiny_model_path, overlong=Overlong(9, 2))
    trainer, _ = fit(tmp_path, make_module(tiny_model_path), make_data(tiny_model_path, overlong=Overlong(8, 2)))
    assert trainer.global_step == 6
