"""Weights on their way from trainer to engine: whole, once, in order, one at a time, with LoRA in them."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from cppo_lightning import policy as policy_module
from cppo_lightning.engines.checksums import checksum, checksums
from cppo_lightning.engines.vllm.lent_memory import WEIGHTS, LentMemory
from cppo_lightning.engines.vllm.weights import received
from cppo_lightning.errors import ConfigError
from cppo_lightning.policy import Policy, PolicyConfig
from cppo_lightning.rollout import Sampling, TransformersEngine
from tests.test_batch import make_batch

PROMPTS = [[5, 6, 7], [9, 8], [30, 40, 50, 60]]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


@pytest.fixture(scope="module")
def tied_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one embedding for both ends."""
    folder = Path(shutil.copytree(tiny_model_path, tmp_path_factory.mktemp("models") / "tied"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def moved(path: str | Path) -> Policy:
    """The policy with other weights than the folder's."""
    policy = Policy.load(PolicyConfig(str(path)))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    return policy


def with_lora(policy: Policy, targets: Iterable[str], **settings: Any) -> Policy:
    """A LoRA adapter on ``targets``, with weights that change the model."""
    from peft import LoraConfig

    policy.model.add_adapter(LoraConfig(r=4, target_modules=list(targets), **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return policy


class AtOnce:
    """Asserts, whenever a tensor is made, that no more than ``most`` of those are in memory: by storage, so views count."""

    def __init__(self, most: int = 1) -> None:
        self.most = most
        self.seen: dict[int, StorageWeakRef] = {}
        self.count = 0

    def add(self, tensor: Tensor) -> Tensor:
        self.count += 1
        self.seen[tensor.untyped_storage().data_ptr()] = StorageWeakRef(tensor.untyped_storage())
        # gloo's threads let go of a gathered tensor a moment after it is there
        deadline = time.monotonic() + 60
        while (alive := sum(not ref.expired() for ref in self.seen.values())) > self.most and time.monotonic() < deadline:
            time.sleep(0.01)
        assert alive <= self.most, f"{alive} at tensor {self.count}"
        return tensor


@contextmanager
def whole_ones_counted(most: int = 1) -> Iterator[AtOnce]:
    """Counts the parameters that were gathered or merged, but not those that are sent as they are."""
    original, counted = policy_module._whole, AtOnce(most)

    def whole(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
        value = original(model, name, parameter)
        return value if value.untyped_storage().data_ptr() == local_of(parameter).data_ptr() else counted.add(value)

    policy_module._whole = whole
    yield counted
    policy_module._whole = original


def local_of(parameter: Tensor) -> UntypedStorage:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).untyped_storage()


def let_go(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Read all of them and keep none."""
    deque(weights, maxlen=0)


def sampled(model: str | Path, weights: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
    engine = TransformersEngine(device="cpu")
    engine.start(str(model))
    engine.load_weights(weights, 0)
    completions = engine.generate(PROMPTS, 2, Sampling(max_tokens=8), top_logprobs=5, seed=3)
    return [t for c in completions for t in (c.ids, c.logp, c.topk_ids, c.topk_logp) if t is not None]


def shard(policy: Policy, *units: nn.Module) -> Policy:
    # the dtype of forward passes differs from that of the weights, as in bf16 training
    for module in (*units, policy):
        fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return policy


def assert_same(ours: Iterable[tuple[str, Tensor]], expected: Iterable[tuple[str, Tensor]], atol: float = 0.0) -> None:
    ours, expected = list(ours), list(expected)
    assert [name for name, _ in ours] == [name for name, _ in expected]
    for (name, one), (_, other) in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def _rank(rank: int, port: int, model: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    whole, policy = moved(model), moved(model)
    shard(policy, *policy.model.model.layers)
    for after_forward in (False, True):
        if after_forward:  # which leaves the root's parameters whole and in bf16
            with torch.no_grad():
                policy(make_batch([3], [4]), 1.0)
        assert_same(policy.named_weights(), whole.named_weights())
        with whole_ones_counted() as counted:
            let_go(policy.named_weights())
        assert counted.count == 24
    with whole_ones_counted():
        ours = sampled(model, policy.named_weights())
    expected = sampled(model, whole.named_weights())
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
    own = sampled(model, Policy.load(PolicyConfig(model)).named_weights())
    assert not all(torch.equal(one, other) for one, other in zip(ours, own, strict=True)), "other weights should show"
    parted = moved(model)
    shard(parted, parted.model.model.embed_tokens)
    with pytest.raises(ConfigError, match="shard them in one group"):
        let_go(parted.named_weights())
    if importlib.util.find_spec("peft") is not None:
        whole, policy = (with_lora(moved(model), ("q_proj", "down_proj")) for _ in range(2))
        shard(policy, *policy.model.model.layers)
        # 1e-6: the adapter's product may be summed in parts
        assert_same(policy.named_weights(), whole.named_weights(), atol=1e-6)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_shards_of_two_ranks_give_the_weights_of_one_bit_for_bit_and_one_at_a_time(tied_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tied_path)), nprocs=2)  # type: ignore[attr-defined]


def test_tied_weights_are_sent_once(tied_path: Path, tiny_model_path: Path) -> None:
    tied, untied = (Policy.load(PolicyConfig(str(path))) for path in (tied_path, tiny_model_path))
    names = [name for name, _ in untied.named_weights()]
    assert [name for name, _ in tied.named_weights()] == [name for name in names if name != "lm_head.weight"]
    assert names[-1] == "lm_head.weight"
    tied.model.lm_head.weight = nn.Parameter(tied.model.lm_head.weight.detach().clone())
    with pytest.raises(ConfigError, match="ties its output head"):
        let_go(tied.named_weights())


def test_names_are_those_of_the_model_whatever_wraps_its_layers(tiny_model_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, wrapped = (Policy.load(PolicyConfig(str(tiny_model_path))) for _ in range(2))
    layers = wrapped.model.model.layers
    layers[0], layers[1] = torch.compile(layers[0]), checkpoint_wrapper(layers[1])
    assert any("_orig_mod" in name for name, _ in wrapped.named_parameters())
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    assert_same(wrapped.named_weights(), plain.named_weights())


@needs_peft
class TestLoRA:
    TARGETS = ("q_proj", "down_proj", "embed_tokens")

    @pytest.fixture
    def policy(self, tiny_model_path: Path) -> Policy:
        return with_lora(moved(tiny_model_path), self.TARGETS)

    def adapted(self, policy: Policy) -> list[Any]:
        return [module for module in policy.model.modules() if hasattr(module, "base_layer")]

    def test_weights_are_those_that_peft_merges_and_the_trainers_stay(self, policy: Policy, tiny_model_path: Path) -> None:
        before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        ours = [(name, tensor.clone()) for name, tensor in policy.named_weights()]
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
        base = [(name, tensor.clone()) for name, tensor in moved(tiny_model_path).named_weights()]
        assert [name for name, _ in ours] == [name for name, _ in base]
        changed = [name for (name, one), (_, other) in zip(ours, base, strict=True) if not torch.equal(one, other)]
        assert len(changed) == len(self.adapted(policy)) == 5
        for layer in self.adapted(policy):
            layer.merge()
        assert_same(policy.named_weights(), ours)  # what is merged already is not added again
        for layer in self.adapted(policy):
            layer.unmerge()
            layer.enable_adapters(False)
        assert_same(policy.named_weights(), base, atol=1e-6)  # merging and unmerging rounds

    def test_an_engine_samples_from_what_the_policy_computes(self, policy: Policy, tiny_model_path: Path) -> None:
        batch = make_batch([4, 2, 7], [5, 3, 6], k=0)
        plain = moved(tiny_model_path)
        plain.model.load_state_dict(dict(policy.named_weights()))
        ours, merged = policy(batch, 1.0).logp, plain(batch, 1.0).logp
        # float32: x (W + s B A) and x W + s (x A) B are rounded differently
        torch.testing.assert_close(ours, merged, rtol=0, atol=2e-5)
        assert (ours - moved(tiny_model_path)(batch, 1.0).logp).abs().max() > 0.01
        assert len(sampled(tiny_model_path, policy.named_weights())) == 24

    def test_one_merged_layer_is_in_memory_at_a_time(self, policy: Policy) -> None:
        with whole_ones_counted() as counted:
            let_go(policy.named_weights())
        assert counted.count == 5

    def test_what_engines_cannot_hold_is_refused(self, tiny_model_path: Path, tied_path: Path) -> None:
        dora = with_lora(moved(tiny_model_path), ["q_proj"], use_dora=True)
        with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj has an adapter other than a plain LoRA"):
            let_go(dora.named_weights())
        parted = with_lora(moved(tied_path), ["embed_tokens"])
        with pytest.raises(ConfigError, match="leave both out of adapters"):
            let_go(parted.named_weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_received_weights_have_the_engines_dtype_and_checksums_of_it(tiny_model_path: Path, dtype: torch.dtype) -> None:
    policy, sums = moved(tiny_model_path), dict[str, int]()
    for name, tensor in received(policy.named_weights(), dtype, sums):
        assert tensor.dtype == dtype
        assert sums[name] == checksum(tensor)
        del tensor
    assert sums == checksums(policy.named_weights(), dtype)
    counted = AtOnce()
    # map, since a generator's own variable would keep one
    copies = map(lambda weight: (weight[0], counted.add(weight[1].clone())), policy.named_weights())
    let_go(map(lambda weight: (weight[0], counted.add(weight[1])), received(copies, dtype, {})))
    assert counted.count == 2 * len(sums)


class Bed:
    """Writes down when it sleeps and wakes."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def sleep(self, level: int = 1) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(tags)


def test_memory_is_brought_when_needed_and_given_back_after_sampling() -> None:
    bed = Bed()
    memory = LentMemory(bed)
    memory.bring(WEIGHTS)  # nothing was lent yet
    with memory.in_use():
        bed.calls.append("sample")
    assert bed.calls == ["sample", "sleep 1"]
    memory.bring(WEIGHTS)
    memory.bring(WEIGHTS)
    with memory.in_use():
        bed.calls.append("sample")
    assert bed.calls[2:] == [["weights"], ["kv_cache"], "sample", "sleep 1"]
    with pytest.raises(RuntimeError, match="enough"), memory.in_use():  # a second sampling with the same weights
        raise RuntimeError("enough")
    assert bed.calls[6:] == [["kv_cache", "weights"], "sleep 1"]
    with LentMemory(None).in_use():  # a CPU's
        pass
