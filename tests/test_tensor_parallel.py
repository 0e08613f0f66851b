"""Ranks that compute each layer together: the same policy, checkpoints and rollouts as without."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cppo_lightning.cli import main
from cppo_lightning.errors import ConfigError
from cppo_lightning.lora import LoRA
from cppo_lightning.policy import Policy
from cppo_lightning.policy_config import PolicyConfig
from cppo_lightning.rollout import RolloutPlan, Sampling, progress
from cppo_lightning.rollout.progress import Progress
from cppo_lightning.rollout.sampler import Rollout
from cppo_lightning.rollout.saved import Unfinished, joined
from cppo_lightning.rollout.settings import drawn_with
from cppo_lightning.strategies import FSDP2
from cppo_lightning.strategies.sharding import Sharding, _assign
from cppo_lightning.strategies.tensor_parallel import parallelize
from tests.rank_rig import on_ranks
from tests.test_batch import make_batch
from tests.test_parallel import CONFIGS, UPDATES, assert_close, fit, half_of, make, resumed, single
from tests.test_resume import held_by
from tests.test_stream import make_rollout

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}


def other_models(folder: Path) -> dict[str, str]:
    """Random models by name: tied embeddings and biases, and rows that four ranks do not divide."""
    torch.manual_seed(0)
    models: dict[str, PreTrainedModel] = {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, vocab_size=258, tie_word_embeddings=True)),
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, vocab_size=212)),
    }
    for name, model in models.items():
        for parameter in model.parameters():  # biases begin with 0, which hides where they are added
            torch.nn.init.normal_(parameter, 0.0, 0.1)
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


# --- the policy


def compare(configs: dict[str, PolicyConfig]) -> None:
    """Compare policies of which four ranks hold parts, two to a layer, with whole ones."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "layers"))
    for name, config in configs.items():
        policy = Sharding(mesh["data"], torch.device("cpu"), mesh["layers"]).load(config)
        whole = Policy.load(config)
        pairs = list(zip(policy.named_parameters(), whole.named_parameters(), strict=True))
        for (ours, part), (theirs, tensor) in pairs:
            assert ours == theirs
            assert isinstance(part, DTensor)
            assert torch.equal(part.full_tensor(), tensor), (name, ours)
            if name == "qwen2":  # as from files that are not laid out like the model
                with torch.no_grad():
                    _assign(part.zero_(), tensor)
                assert torch.equal(part.full_tensor(), tensor), ours
        held = sum(part.to_local().numel() for (_, part), _ in pairs if isinstance(part, DTensor))
        assert held < 0.26 * sum(tensor.numel() for _, (_, tensor) in pairs), "all but norms are in four parts"
        # the same batch on the ranks of a layer, and on both pairs, whose gradients are averaged
        batch = make_batch([3, 9, 1], [4, 12, 7])
        found, expected = policy(batch, 0.7), whole(batch, 0.7)
        torch.testing.assert_close(found.logp, expected.logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
        found.logp.sum().backward()
        expected.logp.sum().backward()
        for (parameter, part), (_, tensor) in pairs:
            assert isinstance(part.grad, DTensor)
            assert tensor.grad is not None
            gap = float((part.grad.full_tensor() - tensor.grad).abs().max() / tensor.grad.abs().max())
            assert gap < 1e-5, (name, parameter, gap)
        assert_close(dict(policy.named_weights()), dict(whole.named_weights()), 0, 0)


@pytest.mark.slow
def test_ranks_that_compute_layers_together_have_the_policy_of_one(tiny_model_path: Path, tmp_path: Path) -> None:
    configs = {name: PolicyConfig(path) for name, path in other_models(tmp_path).items()}
    configs["llama"] = replace(configs["llama"], gradient_checkpointing=True)
    on_ranks(4, compare, {"qwen3": PolicyConfig(str(tiny_model_path)), **configs})


# --- what is refused


def divide(ranks: int, models: dict[str, PreTrainedModel]) -> dict[str, str]:
    """What is said of each model on that many ranks, which are not there."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh, said = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "layers"))["layers"], {}
    for name, model in models.items():
        with pytest.raises(ConfigError) as refused:
            parallelize(model, mesh)
        said[name] = str(refused.value)
    return said


def test_models_that_cannot_be_divided_are_refused() -> None:
    sizes: dict[str, Any] = {**SIZES, "vocab_size": 212}
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    models = {
        "no plan": GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=4, vocab_size=212)),
        "experts": Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **HEADS, **experts)),
        "heads": LlamaForCausalLM(LlamaConfig(**sizes, **HEADS)),
        "width": LlamaForCausalLM(LlamaConfig(**{**sizes, "intermediate_size": 50}, num_attention_heads=4)),
        "vocabulary": LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 211}, num_attention_heads=4)),
    }
    (said,) = on_ranks(1, divide, 4, models)
    assert said["no plan"].startswith("trainer.strategy.tensor_parallel_size is above 1, but transformers has no ")
    assert said["no plan"].endswith("for GPT2LMHeadModel; take 1")
    assert "has the plan 'moe_tp_experts', which is not supported; take 1" in said["experts"]
    assert (
        "tensor_parallel_size = 4 does not divide num_key_value_heads = 2 of LlamaForCausalLM; take a divisor of 2"
        in said["heads"]
    )
    assert (
        "does not divide the rows of model.layers.0.mlp.gate_proj = 50 of LlamaForCausalLM; take a divisor of 2"
        in said["width"]
    )
    assert "does not divide the rows of model.embed_tokens = 211 of LlamaForCausalLM; take a divisor of 1" in said["vocabulary"]


def with_adapters(config: PolicyConfig) -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "layers"))
    with pytest.raises(ConfigError, match=r"model\.policy\.lora does not go with .*tensor_parallel_size = 2; take 1"):
        Sharding(mesh["data"], torch.device("cpu"), mesh["layers"]).load(config)


def test_adapters_are_refused(tiny_model_path: Path) -> None:
    pytest.importorskip("peft")
    on_ranks(1, with_adapters, PolicyConfig(str(tiny_model_path), lora=LoRA(rank=2)))


def test_ranks_must_divide_into_groups(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size must be at least 1, got 0"):
        FSDP2(tensor_parallel_size=0)
    with pytest.raises(ConfigError, match="tensor_parallel_size = 2 does not divide 1 ranks"):
        fit(make(str(tiny_model_path)), 1, str(tmp_path), strategy=FSDP2(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match="tensor_parallel_size = 2 does not divide the 1 ranks of a replica"):
        fit(make(str(tiny_model_path)), 2, str(tmp_path), strategy=FSDP2(replicas=2, tensor_parallel_size=2))


# --- runs


def pairs() -> FSDP2:
    return FSDP2(tensor_parallel_size=2)


@pytest.mark.slow
def test_a_checkpoint_goes_on_without(tiny_model_path: Path, tmp_path: Path) -> None:
    whole, other = on_ranks(2, half_of, str(tiny_model_path), 2, str(tmp_path), {}, pairs)
    assert_close(other, whole, 0, 0)
    (found,) = on_ranks(1, resumed, str(tiny_model_path), 1, str(tmp_path), {})
    assert found["step"] == UPDATES
    assert_close(found["weights"], whole, 1e-5, 1e-5)


@pytest.mark.slow
def test_a_checkpoint_in_one_file_goes_on_with(tiny_model_path: Path, tmp_path: Path) -> None:
    (whole,) = on_ranks(1, half_of, str(tiny_model_path), 1, str(tmp_path), {}, single)
    found, _ = on_ranks(2, resumed, str(tiny_model_path), 2, str(tmp_path), {}, pairs)
    assert_close(found["weights"], whole, 1e-5, 1e-5)


SETTINGS = drawn_with(RolloutPlan(), Sampling(), 0, 0, "")


def went_on(state: Any, sampling: tuple[int, int], training: tuple[int, int]) -> Unfinished:
    """What a rank goes on with from a checkpoint."""
    found: dict[str, Any] = {}
    rollouts: Any = SimpleNamespace(restore=lambda position, ahead: found.update(ahead=ahead))
    stream: Any = SimpleNamespace(restore=lambda hand, generators: found.update(hand=hand, generators=generators))
    Progress(rollouts, stream, sampling, training, SETTINGS).load_state_dict(state)
    return Unfinished(**found)


def ids(rollout: Rollout | None) -> list[str]:
    return [] if rollout is None else [sample.problem.id for sample in rollout.samples]


def test_what_pairs_of_ranks_hold_goes_on_in_pairs_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four ranks has drawn ahead, and each pair trains on one rollout, of which a checkpoint has one copy."""
    held = [replace(held_by(rank), hand=held_by(rank // 2).hand) for rank in range(4)]
    monkeypatch.setattr(progress, "on_rank_zero", lambda _: [(rank // 2, mine.state_dict()) for rank, mine in enumerate(held)])
    rollouts: Any = SimpleNamespace(position=7, ready=lambda seconds: None)
    stream: Any = SimpleNamespace(hand=None)
    state = Progress(rollouts, stream, (0, 4), (0, 2), SETTINGS).state_dict(0, 0.0)
    assert [part["hand"] is None for part in state["ranks"]] == [False, True, False, True]
    for rank, mine in enumerate(held):
        found = went_on(state, (rank, 4), (rank // 2, 2))
        assert found.hand is not None
        assert mine.hand is not None
        assert ids(found.hand.rollout) == ids(mine.hand.rollout)
        assert (found.hand.shares, found.hand.trained) == (mine.hand.shares, 1)
        assert (ids(found.ahead), found.generators) == (ids(mine.ahead), {"rank": rank})
    alone = went_on(state, (0, 1), (0, 1))
    assert alone.hand is not None
    assert sorted(ids(alone.hand.rollout)) == sorted(name for mine in held[::2] if mine.hand for name in ids(mine.hand.rollout))
    assert sorted(ids(alone.ahead)) == sorted(name for mine in held for name in ids(mine.ahead))


def test_rollouts_of_several_ranks_are_one_that_took_the_mean_of_their_times() -> None:
    parts = [replace(make_rollout([[0, 1]]), seconds_sampling=seconds, seconds_verifying=1.0) for seconds in (1.0, 4.0)]
    whole = joined(parts)
    assert whole.samples == [*parts[0].samples, *parts[1].samples]
    assert (whole.seconds_sampling, whole.seconds_verifying) == (2.5, 1.0)


def command(folder: str, name: str, strategy: str, *arguments: str) -> None:
    os.chdir(folder)
    configs = [f"--config={CONFIGS}/{file}.yaml" for file in ("debug", f"strategy/{strategy}")]
    main(["fit", *configs, f"--trainer.logger.init_args.name={name}", *arguments])


def logged(folder: Path) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag) if "second" not in tag}


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without(tiny_model_path: Path, tmp_path: Path) -> None:
    """Each rank samples the same problems with the same seeds in both, and all of them are trained on in one update."""
    run = (f"--model.policy.path={tiny_model_path}", "--trainer.devices=2", "--trainer.max_epochs=2", "--data.plan.updates=1")
    on_ranks(2, command, str(tmp_path), "together", "fsdp2_tp", *run)
    on_ranks(2, command, str(tmp_path), "apart", "fsdp2", *run)
    together, apart = (logged(tmp_path / "runs" / name / "version_0") for name in ("together", "apart"))
    assert together.keys() == apart.keys()
    assert ("train/loss", 1) in together
    for (tag, step), value in apart.items():
        # with the weights that sampled, rounding alone says on which side of 1 a ratio is
        if tag != "mask/toward":
            # gaps of log-probabilities that should be none are rounding themselves
            assert together[tag, step] == pytest.approx(value, rel=1e-3, abs=1e-5 if "gap" in tag else 1e-6), (tag, step)
