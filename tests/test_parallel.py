"""Sharded policies: loaded, trained, saved and resumed on real ranks."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.callbacks import FailureCheckpoint
from cppo_lightning.cli import main
from cppo_lightning.engines import TransformersEngine
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.export import _fill
from cppo_lightning.lora import LoRA, without_adapters
from cppo_lightning.losses import ReferenceKL
from cppo_lightning.module import RLVRModule
from cppo_lightning.policy import Policy
from cppo_lightning.policy_config import PolicyConfig, check_precision
from cppo_lightning.ranks import AllRanksError, data_share
from cppo_lightning.replacing import standing
from cppo_lightning.strategies import FSDP2, sharded_checkpoint, sharding
from cppo_lightning.strategies.sharding import Sharding, _assign
from cppo_lightning.trust_regions import PPOClip
from cppo_lightning.untrusted import META, check_checkpoint
from tests.rank_rig import on_ranks
from tests.test_batch import make_batch
from tests.test_fit import make_data
from tests.test_untrusted import Trap

pytestmark = pytest.mark.slow
UPDATES = 4
Strategy = Callable[[], Any]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


class Batches(torch.utils.data.Dataset[RolloutBatch]):
    """Four updates on random rows, of which each rank has its share."""

    def __init__(self, trainer: Trainer, start: int = 0) -> None:
        self.trainer, self.start = trainer, start

    def __len__(self) -> int:
        return UPDATES // 2

    def __getitem__(self, update: int) -> RolloutBatch:
        rank, ranks = data_share(self.trainer)
        batch = make_batch([3, 9, 2, 5, 4, 1, 7, 6], [4, 1, 30, 8, 8, 2, 11, 9], seed=update)
        step = self.trainer.global_step
        return replace(batch, policy_version=torch.full((8,), step - update)).select(torch.arange(rank, 8, ranks))


def make(model: str, **settings: Any) -> RLVRModule:
    policy = PolicyConfig(model, **settings.pop("policy", {}))
    defaults: dict[str, Any] = {
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, fused=True),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8),
        "reference_kl": ReferenceKL(0.1),
        "micro_batch_tokens": 60,
    }
    return RLVRModule(policy, PPOClip(0.9, 9.0), **{**defaults, **settings})


def make_trainer(ranks: int, folder: str, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults: dict[str, Any] = {"strategy": FSDP2(), "accelerator": "cpu", "devices": ranks}
    return Trainer(**{**defaults, **quiet, **settings}, use_distributed_sampler=False, default_root_dir=folder)


def fit(module: RLVRModule, ranks: int, folder: str, epochs: int = 2, resume: str | None = None, **settings: Any) -> Trainer:
    trainer = make_trainer(ranks, folder, max_epochs=epochs, **settings)
    trainer.fit(module, DataLoader(Batches(trainer), batch_size=None), ckpt_path=resume, weights_only=True)
    return trainer


def weights(module: RLVRModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.named_weights()}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# --- loading


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of experts, whose files have a tensor per expert where the model has one for all of a layer."""
    folder = tmp_path_factory.mktemp("models") / "moe"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "vocab_size": 211}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def shards(config: PolicyConfig, ranks: int) -> int:
    """Compare a sharded policy with a whole one; returns this rank's parameters."""
    torch.distributed.init_process_group("gloo")
    policy = Sharding(init_device_mesh("cpu", (ranks,)), torch.device("cpu")).load(config)
    whole = Policy.load(config)
    for (name, shard), (expected_name, expected) in zip(policy.named_parameters(), whole.named_parameters(), strict=True):
        assert name == expected_name
        assert isinstance(shard, DTensor)
        assert torch.equal(shard.full_tensor(), expected), name
        assert shard.requires_grad == expected.requires_grad
    for (name, buffer), (expected_name, expected) in zip(policy.named_buffers(), whole.named_buffers(), strict=True):
        assert name == expected_name
        assert torch.equal(buffer, expected)
    buffer, rank = torch.zeros(3), torch.distributed.get_rank()
    _assign(buffer, torch.full((3,), 7.0 + rank))
    assert buffer.tolist() == [7.0] * 3, "what rank 0 has"
    held = sum(p.to_local().numel() for p in policy.parameters() if isinstance(p, DTensor))
    batch = make_batch([3, 9], [4, 12])
    policy(batch, 1.0).logp.sum().backward()
    whole(batch, 1.0).logp.sum().backward()
    for (name, shard), expected in zip(policy.named_parameters(), whole.parameters(), strict=True):
        if expected.requires_grad:
            assert isinstance(shard.grad, DTensor)
            assert expected.grad is not None
            torch.testing.assert_close(shard.grad.full_tensor(), expected.grad, rtol=1e-5, atol=1e-5, msg=name)
    return held


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "lora", "experts"])
def test_each_rank_loads_its_shards_and_together_they_are_the_model(kind: str, tiny_model_path: Path, moe_path: Path) -> None:
    config = PolicyConfig(str(tiny_model_path))
    if kind == "lora":
        pytest.importorskip("peft")
        config = replace(config, lora=LoRA(rank=4))
    config = replace(config, gradient_checkpointing=kind == "checkpointed")
    if kind == "experts":
        config = PolicyConfig(str(moe_path))
    held = on_ranks(2, shards, config, 2)
    total = sum(p.numel() for p in Policy.load(config).parameters())
    assert sum(held) == total
    assert max(held) <= 0.51 * total  # rows that ranks do not divide


def filled(config: PolicyConfig) -> None:
    """What ``config`` says is put into a policy that was loaded with other attention, and given other values."""
    torch.distributed.init_process_group("gloo")
    policy, whole = (Policy.load(replace(config, attn_implementation="eager")) for _ in range(2))
    for parameter in policy.parameters():
        torch.nn.init.zeros_(parameter)
    sharding._fill(policy, config)
    assert all(torch.equal(ours, expected) for ours, expected in zip(policy.parameters(), whole.parameters(), strict=True))


def test_the_one_rank_that_loads_a_model_whole_needs_no_attention_of_a_gpu(moe_path: Path) -> None:
    on_ranks(1, filled, PolicyConfig(str(moe_path), attn_implementation="flash_attention_2"))


def test_a_policy_without_weights_has_none_but_its_buffers(tiny_model_path: Path) -> None:
    policy = Policy.without_weights(PolicyConfig(str(tiny_model_path)))
    assert all(p.is_meta for p in policy.parameters())
    whole = Policy.load(PolicyConfig(str(tiny_model_path)))
    for (name, ours), (_, expected) in zip(policy.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(ours, expected), name
    assert not torch.nn.Linear(2, 2).weight.is_meta, "modules made afterwards are as ever"


# --- training


def trained(model: str, ranks: int, folder: str, settings: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    strategy = FSDP2(**run.pop("strategy", {}))
    module = make(model, **settings)
    trainer = fit(module, ranks, folder, strategy=strategy, **run)
    parameters = [p for p in module.parameters() if p.requires_grad]
    states = [value for state in trainer.optimizers[0].state.values() for value in state.values() if value.dim()]
    reference = {} if module.reference is None else dict(module.reference.named_weights())
    return {
        "weights": weights(module),
        "reference": {name: tensor.clone() for name, tensor in reference.items()},
        "sharded": all(isinstance(p, DTensor) for p in module.parameters()),
        "dtypes": {str(tensor.dtype) for tensor in [*parameters, *states]},
        "buffers": {name: tensor.clone() for name, tensor in module.named_buffers()},
        "trained": sum(p.numel() for p in parameters),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


def test_the_reference_is_sharded_alike_and_stays(tiny_model_path: Path, tmp_path: Path) -> None:
    one, two = (on_ranks(n, trained, str(tiny_model_path), n, str(tmp_path), {}, {})[0] for n in (1, 2))
    initial = dict(Policy.load(PolicyConfig(str(tiny_model_path))).named_weights())
    assert one["sharded"]
    assert two["sharded"]
    assert_close(two["reference"], initial, 0, 0)
    # Adam divides by the root of squares, near 0 where gradients cancel: relative to steps of 1e-3
    assert_close(two["weights"], one["weights"], 1e-5, 1e-5)
    assert not torch.equal(two["weights"]["model.embed_tokens.weight"], initial["model.embed_tokens.weight"])


@needs_peft
def test_lora_trains_adapters_and_leaves_the_rest(tiny_model_path: Path, tmp_path: Path) -> None:
    settings = {"policy": {"lora": LoRA(rank=4, targets=["q_proj", "down_proj"])}}
    one, two = (on_ranks(n, trained, str(tiny_model_path), n, str(tmp_path), settings, {})[0] for n in (1, 2))
    initial = dict(Policy.load(PolicyConfig(str(tiny_model_path))).named_weights())
    adapted = [tensor.shape for name, tensor in initial.items() if "q_proj" in name or "down_proj" in name]
    assert two["trained"] == sum(4 * (rows + columns) for rows, columns in adapted)
    assert not two["reference"], "it is the model without its adapters"
    assert two["metrics"]["train/reference_kl"] > 1e-4
    for tag, value in one["metrics"].items():
        assert two["metrics"][tag] == pytest.approx(value, rel=1e-4, abs=1e-6) or "second" in tag, tag
    assert_close(two["weights"], one["weights"], 1e-5, 1e-5)
    changed = {name for name, tensor in two["weights"].items() if not torch.equal(tensor, initial[name])}
    assert changed == {name for name in initial if "q_proj" in name or "down_proj" in name}


@pytest.mark.parametrize(
    ("precision", "held", "atol"), [("bf16-mixed", {"torch.float32"}, 5e-3), ("bf16-true", {"torch.bfloat16"}, 2e-2)]
)
def test_precision_says_what_is_held(
    precision: str, held: set[str], atol: float, tiny_model_path: Path, tmp_path: Path
) -> None:
    (full, _), (half, _) = (
        on_ranks(2, trained, str(tiny_model_path), 2, str(tmp_path), {}, {"precision": name}) for name in ("32-true", precision)
    )
    assert full["dtypes"] == {"torch.float32"}
    assert half["dtypes"] == held
    assert full["buffers"]
    assert_close(half["buffers"], full["buffers"], 0, 0)
    # four steps of 1e-3, whose sign bf16 may turn where gradients are small
    assert_close({n: t.float() for n, t in half["weights"].items()}, full["weights"], 0, atol)
    assert half["metrics"]["train/loss"] == pytest.approx(full["metrics"]["train/loss"], rel=0.05)
    assert half["metrics"]["train/loss"] != full["metrics"]["train/loss"]


def test_offloaded_and_hybrid_shards_train_as_others_do(tiny_model_path: Path, tmp_path: Path) -> None:
    arguments = (str(tiny_model_path), 2, str(tmp_path), {})
    plain, *others = (
        on_ranks(2, trained, *arguments, {"strategy": how})[0] for how in ({}, {"cpu_offload": True}, {"replicas": 2})
    )
    for other in others:
        assert_close(other["weights"], plain["weights"], 1e-5, 1e-5)


def test_precisions_that_lose_updates_are_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    check_precision("bf16-true", "bfloat16")
    with pytest.raises(ConfigError, match=r"model\.policy\.dtype = bfloat16 with trainer\.precision = bf16-mixed"):
        check_precision("bf16-mixed", "bfloat16")
    with pytest.raises(ConfigError, match=r"trainer\.precision = 16-true is not supported"):
        fit(make(str(tiny_model_path)), 1, str(tmp_path), strategy="auto", precision="16-true")


def test_replicas_must_divide_ranks(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="replicas must be at least 1, or nodes, got 0"):
        FSDP2(replicas=0)
    with pytest.raises(ConfigError, match="replicas = 3 does not divide 1 ranks"):
        fit(make(str(tiny_model_path)), 1, str(tmp_path), strategy=FSDP2(replicas=3))


# --- checkpoints


def half_of(model: str, ranks: int, folder: str, settings: dict[str, Any], strategy: Strategy = FSDP2) -> dict[str, Tensor]:
    """Train half of the epochs, save, and go on to the end."""
    module = make(model, **settings)
    fit(module, ranks, folder, epochs=1, strategy=strategy()).save_checkpoint(f"{folder}/half.ckpt")
    whole = make(model, **settings)
    fit(whole, ranks, folder, strategy=strategy())
    return weights(whole)


def resumed(model: str, ranks: int, folder: str, settings: dict[str, Any], strategy: Strategy = FSDP2) -> dict[str, Any]:
    module = make(model, **settings)
    trainer = fit(module, ranks, folder, resume=f"{folder}/half.ckpt", strategy=strategy())
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    return {"weights": weights(module), "step": trainer.global_step, "rate": rate}


@pytest.fixture(scope="module")
def half(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of two ranks in the middle of a run, and the weights at its end."""
    folder = tmp_path_factory.mktemp("half")
    return folder / "half.ckpt", on_ranks(2, half_of, str(tiny_model_path), 2, str(folder), {})[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_checkpoint_of_two_ranks_resumes_on_others(
    ranks: int, half: tuple[Path, dict[str, Tensor]], tiny_model_path: Path
) -> None:
    checkpoint, whole = half
    found = on_ranks(ranks, resumed, str(tiny_model_path), ranks, str(checkpoint.parent), {})
    for rank in found:
        assert rank["step"] == UPDATES
        assert rank["rate"] == pytest.approx(1e-3 * 0.8**UPDATES)
        tolerance = 0 if ranks == 2 else 1e-5
        assert_close(rank["weights"], whole, tolerance, tolerance)


def ddp() -> str:
    return "ddp"


def test_a_checkpoint_in_shards_resumes_without(half: tuple[Path, dict[str, Tensor]], tiny_model_path: Path) -> None:
    checkpoint, whole = half
    for found in on_ranks(2, resumed, str(tiny_model_path), 2, str(checkpoint.parent), {}, ddp):
        assert found["step"] == UPDATES
        assert_close(found["weights"], whole, 1e-5, 1e-5)


def single() -> str:
    return "auto"


def test_tied_embeddings_are_in_a_checkpoint_once(tiny_model_path: Path, tmp_path: Path) -> None:
    model = other_sizes(tiny_model_path, tmp_path / "tied", tie_word_embeddings=True)
    whole, _ = on_ranks(2, half_of, model, 2, str(tmp_path), {})
    held = [name for file in (tmp_path / "half.ckpt").glob("*.safetensors") for name in load_file(file)]
    assert "state_dict/policy.model.model.embed_tokens.weight" in held
    assert "state_dict/policy.model.lm_head.weight" not in held
    for strategy in (single, FSDP2):
        (found,) = on_ranks(1, resumed, model, 1, str(tmp_path), {}, strategy)
        assert_close(found["weights"], whole, 1e-5, 1e-5)
    exported, initial = (Policy.load(PolicyConfig(model)) for _ in range(2))
    _fill(exported, tmp_path / "half.ckpt")
    assert exported.model.lm_head.weight is exported.model.model.embed_tokens.weight
    for (name, ours), (_, before) in zip(exported.named_weights(), initial.named_weights(), strict=True):
        assert not torch.equal(ours, before), f"{name} was trained"


def test_a_checkpoint_in_one_file_resumes_in_shards(tiny_model_path: Path, tmp_path: Path) -> None:
    (whole,) = on_ranks(1, half_of, str(tiny_model_path), 1, str(tmp_path), {}, single)
    assert (tmp_path / "half.ckpt").is_file()
    for found in on_ranks(2, resumed, str(tiny_model_path), 2, str(tmp_path), {}):
        assert found["step"] == UPDATES
        assert found["rate"] == pytest.approx(1e-3 * 0.8**UPDATES)
        assert_close(found["weights"], whole, 1e-5, 1e-5)
    shallower = other_sizes(tiny_model_path, tmp_path / "shallower", num_hidden_layers=1, layer_types=["full_attention"])
    on_ranks(1, refused_on_load, shallower, str(tmp_path), "is of another model: it trains 25 parameters, this one 14")


def weights_alone(model: str, folder: str, saved: Strategy, read: Strategy) -> None:
    """Save no optimizer states, evaluate that, and try to go on from it."""
    module, found, path = make(model), make(model), f"{folder}/half.ckpt"
    fit(module, 1, folder, epochs=1, strategy=saved()).save_checkpoint(path, weights_only=True)
    nothing = DataLoader([])  # type: ignore[arg-type]
    make_trainer(1, folder, strategy=read()).validate(found, nothing, path, verbose=False, weights_only=True)
    assert_close(weights(found), weights(module), 0, 0)
    initial = dict(Policy.load(PolicyConfig(model)).named_weights())
    assert any(not torch.equal(tensor, initial[name]) for name, tensor in weights(found).items()), "nothing was learned"
    if read is FSDP2:
        with pytest.raises(ConfigError, match=r"ckpt_path: .*half\.ckpt' holds weights alone, which can be evaluated"):
            fit(make(model), 1, folder, resume=path)


@pytest.mark.parametrize(("saved", "read"), [(FSDP2, FSDP2), (FSDP2, single), (single, FSDP2)])
def test_weights_alone_can_be_evaluated(saved: Strategy, read: Strategy, tiny_model_path: Path, tmp_path: Path) -> None:
    on_ranks(1, weights_alone, str(tiny_model_path), str(tmp_path), saved, read)


@pytest.mark.parametrize("strategy", [single, FSDP2])
def test_a_checkpoint_that_lost_its_name_resumes(
    strategy: Strategy, half: tuple[Path, dict[str, Tensor]], tiny_model_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(half[0], tmp_path / ".half.ckpt.old")
    (found,) = on_ranks(1, resumed, str(tiny_model_path), 1, str(tmp_path), {}, strategy)
    assert found["step"] == UPDATES
    assert_close(found["weights"], half[1], 1e-5, 1e-5)
    check_checkpoint(str(tmp_path / "half.ckpt"))


@needs_peft
def test_a_model_without_its_adapters_is_the_one_before(tiny_model_path: Path) -> None:
    config = PolicyConfig(str(tiny_model_path))
    base, policy, batch = Policy.load(config), Policy.load(replace(config, lora=LoRA(rank=4))), make_batch([3, 9], [4, 12])
    adapters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for parameter in adapters:
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        expected, adapted = base(batch, 1.0).logp, policy(batch, 1.0).logp
        with without_adapters(policy):
            assert torch.equal(policy(batch, 1.0).logp, expected)
        assert torch.equal(policy(batch, 1.0).logp, adapted)
    assert not torch.allclose(adapted, expected)
    assert all(parameter.requires_grad for parameter in adapters)


@needs_peft
def test_a_checkpoint_with_adapters_resumes(tiny_model_path: Path, tmp_path: Path) -> None:
    settings = {"policy": {"lora": LoRA(rank=4)}, "reference_kl": None}
    whole, _ = on_ranks(2, half_of, str(tiny_model_path), 2, str(tmp_path), settings)
    (one,) = on_ranks(1, resumed, str(tiny_model_path), 1, str(tmp_path), settings)
    assert_close(one["weights"], whole, 1e-5, 1e-5)


def test_a_checkpoint_holds_each_trained_tensor_once_and_no_reference(half: tuple[Path, Any], tiny_model_path: Path) -> None:
    folder, _ = half
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".pt"}
    assert not list(folder.parent.glob(".*")), "nothing unfinished is left"
    held: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            held[name] = held.get(name, 0) + tensor.numel()
    policy = Policy.load(PolicyConfig(str(tiny_model_path)))
    sizes = {name: parameter.numel() for name, parameter in policy.named_parameters()}
    assert {n: s for n, s in held.items() if n.startswith("state_dict")} == {
        f"state_dict/policy.{n}": s for n, s in sizes.items()
    }
    assert len(held) == 3 * len(sizes), "weights and Adam's two moments"


def other_sizes(model: Path, folder: Path, **sizes: Any) -> str:
    """A random model like ``model`` but for its sizes."""
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, **sizes)).save_pretrained(folder)
    return str(folder)


def refused_on_load(model: str, folder: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(make(model), 1, folder, resume=f"{folder}/half.ckpt")


def test_other_checkpoints_are_refused(half: tuple[Path, Any], tiny_model_path: Path, moe_path: Path, tmp_path: Path) -> None:
    model, folder = str(tiny_model_path), shutil.copytree(half[0], tmp_path / "half.ckpt")
    on_ranks(1, refused_on_load, str(moe_path), str(tmp_path), "lacks .* weights of this run's model")
    narrower = other_sizes(tiny_model_path, tmp_path / "narrower", intermediate_size=96)
    on_ranks(1, refused_on_load, narrower, str(tmp_path), r"another model: .*down_proj\.weight is \[64, 128\], here \[64, 96\]")
    check_checkpoint(str(folder))
    rest = torch.load(folder / META, weights_only=True)
    torch.save({**rest, "extra": Trap(tmp_path / "trapped")}, folder / META)
    on_ranks(1, refused_on_load, model, str(tmp_path), "holds more than tensors and plain values")
    with pytest.raises(ConfigError, match="holds more than tensors and plain values"):
        check_checkpoint(str(folder))
    assert not (tmp_path / "trapped").exists()
    (folder / META).unlink()
    on_ranks(1, refused_on_load, model, str(tmp_path), "cannot read the checkpoint")
    shutil.rmtree(folder)
    folder.write_text("weights")
    on_ranks(1, refused_on_load, model, str(tmp_path), "holds more than tensors and plain values")


def cut_short(model: str, folder: str) -> None:
    """Save twice under one name; the second time the process is gone before the end."""
    module, original = make(model), sharded_checkpoint.put
    trainer = fit(module, 1, folder, epochs=1)
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    before = {file.name: file.read_bytes() for file in Path(folder, "half.ckpt").iterdir()}

    def gone(new: Path, place: Path) -> None:
        raise KeyboardInterrupt

    sharded_checkpoint.put = gone
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(f"{folder}/half.ckpt")
    assert {file.name: file.read_bytes() for file in Path(folder, "half.ckpt").iterdir()} == before
    sharded_checkpoint.put = original
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    after = {file.name: file.read_bytes() for file in Path(folder, "half.ckpt").iterdir()}
    assert after.keys() == before.keys()
    assert after != before, "what was left has not been in the way"
    assert [path.name for path in Path(folder).iterdir()] == ["half.ckpt"]


def test_a_save_that_is_cut_short_leaves_the_checkpoint_before(tiny_model_path: Path, tmp_path: Path) -> None:
    on_ranks(1, cut_short, str(tiny_model_path), str(tmp_path))


class Failing(Callback):
    """Ends the run after its first step, and notes how it ends."""

    def __init__(self) -> None:
        self.ended: list[BaseException] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        raise AllRanksError("the engine is gone")

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.ended.append(exception)


def disk_full(model: str, folder: str) -> list[str]:
    """Rank 1 has no place for its shards; what is noted at the error that ends the run."""
    write, failing = HuggingFaceStorageWriter.write_data, Failing()

    def write_data(self: Any, *arguments: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments)

    HuggingFaceStorageWriter.write_data = write_data  # type: ignore[method-assign]
    with pytest.raises(AllRanksError, match="the engine is gone") as end:
        fit(make(model), 2, folder, callbacks=[FailureCheckpoint(folder), failing])
    assert failing.ended == [end.value], "later callbacks are told"
    return end.value.__notes__


def test_a_full_disk_does_not_hide_why_the_run_ended(tiny_model_path: Path, tmp_path: Path) -> None:
    reason = f"the checkpoint '{tmp_path}/after_failure.ckpt' cannot be written: rank 1: OSError(28, 'No space left on device')"
    for (note,) in on_ranks(2, disk_full, str(tiny_model_path), str(tmp_path)):
        assert note == f"the run could not be saved in '{tmp_path}/after_failure.ckpt': {reason}"


def exchange_fails(patch: pytest.MonkeyPatch, number: int | None) -> None:
    """The kernel answers with an error, or the C library has no such function."""

    def answer(*_: Any) -> int:
        assert number is not None
        ctypes.set_errno(number)
        return -1

    patch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace() if number is None else SimpleNamespace(renameat2=answer))


ALL_ARE_EXCHANGED = -1


@pytest.mark.parametrize("system", [ALL_ARE_EXCHANGED, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, None])
@pytest.mark.parametrize("before", ["nothing", "folder", "file", "link"])
def test_a_folder_takes_its_place_whatever_is_there(
    before: str, system: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if system != ALL_ARE_EXCHANGED:
        exchange_fails(monkeypatch, system)
    new, place, other = tmp_path / "new", tmp_path / "place", tmp_path / "other"
    for folder in (new, other):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    made: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "folder": lambda: shutil.copytree(other, place),
        "file": lambda: place.write_text("old"),
        "link": lambda: place.symlink_to(other),
    }
    made[before]()
    sharded_checkpoint.put(new, place)
    assert (place / "file").read_text() == "new"
    assert not place.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "place"]
    assert (other / "file").read_text() == "other"


def test_what_a_kill_leaves_between_two_names_is_found_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange_fails(monkeypatch, errno.EINVAL)
    new, place = tmp_path / "new", tmp_path / "place"
    for folder in (new, place):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    assert standing(place) == str(place)

    def gone(self: Path, target: Path) -> Path:
        if self == new:
            raise KeyboardInterrupt
        return rename(self, target)

    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", gone)
        with pytest.raises(KeyboardInterrupt):
            sharded_checkpoint.put(new, place)
    assert Path(standing(place), "file").read_text() == "place"
    sharded_checkpoint.put(new, place)
    assert standing(place) == str(place)
    assert [(path.name, (path / "file").read_text()) for path in tmp_path.iterdir()] == [("place", "new")]


def test_other_failures_of_an_exchange_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange_fails(monkeypatch, errno.EACCES)
    for name in ("new", "place"):
        (tmp_path / name).mkdir()
    with pytest.raises(PermissionError):
        sharded_checkpoint.put(tmp_path / "new", tmp_path / "place")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "place"]


# --- from the command line

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "strategy").glob("*.yaml")))
@pytest.mark.parametrize("base", ["base", "quickstart"])
def test_strategies_go_with_every_config(
    base: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model_path: Path
) -> None:
    import yaml

    monkeypatch.setattr(os, "environ", dict(os.environ))
    files = [f"--config={CONFIGS}/{file}.yaml" for file in (base, "trust_region/cppo", f"strategy/{name}")]
    with pytest.raises(SystemExit) as end:
        main(["fit", *files, f"--model.policy.path={tiny_model_path}", "--print_config"])
    assert end.value.code in (0, None)
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    strategy = trainer["strategy"]
    assert strategy["class_path"].endswith("FSDP2") if isinstance(strategy, dict) else strategy in ("auto", "ddp"), strategy


def command(folder: str, *arguments: str) -> None:
    os.chdir(folder)
    main(["fit", f"--config={CONFIGS}/debug.yaml", f"--config={CONFIGS}/strategy/fsdp2.yaml", *arguments])


def test_two_ranks_from_the_command_line_and_one_goes_on(tiny_model_path: Path, tmp_path: Path) -> None:
    """The whole loop, in which the engine samples with what is gathered: the callbacks of debug.yaml stop a run otherwise."""
    run = ("--data.plan.prompts=8", f"--model.policy.path={tiny_model_path}", "--trainer.enable_checkpointing=true")
    on_ranks(2, command, str(tmp_path), *run, "--trainer.devices=2", "--trainer.max_epochs=1")
    (checkpoint,) = tmp_path.glob("runs/debug/version_0/checkpoints/*.ckpt")
    on_ranks(1, command, str(tmp_path), *run, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}")
    (later,) = tmp_path.glob("runs/debug/version_1/checkpoints/*.ckpt")
    steps = [torch.load(folder / META, weights_only=True)["global_step"] for folder in (checkpoint, later)]
    assert 0 < steps[0] < steps[1]


class TakesNoMore(TransformersEngine):
    """On rank 1 its second load breaks off behind the first parameter."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if version and torch.distributed.get_rank() == 1:
            next(iter(weights))
            raise RolloutError("the engine is full")
        super().load_weights(weights, version)


def _load_breaks_off(model: str, folder: str) -> str:
    data = make_data(Path(model), engine=TakesNoMore())
    trainer = make_trainer(
        2, folder, strategy=FSDP2(timeout=timedelta(seconds=60)), max_epochs=2, callbacks=[FailureCheckpoint()]
    )
    try:
        trainer.fit(make(model, reference_kl=None), datamodule=data)
    except AllRanksError as error:
        return str(error)
    finally:
        data.close()
    return "it went on"


def test_a_load_that_breaks_off_on_one_rank_ends_all_and_saves(tiny_model_path: Path, tmp_path: Path) -> None:
    """Each parameter is gathered from all ranks, which wait for those that have failed."""
    assert on_ranks(2, _load_breaks_off, str(tiny_model_path), str(tmp_path)) == ["rank 1: the engine is full"] * 2
    check_checkpoint(str(tmp_path / "checkpoints" / "after_failure.ckpt"))
