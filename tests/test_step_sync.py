"""Between a micro-batch's start and its end the host waits for no device, whichever trust region and callbacks look on."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

import cppo_lightning.callbacks as callbacks
from cppo_lightning.divergences import TopKTV
from cppo_lightning.losses import ReferenceKL, Totals
from cppo_lightning.mismatch import TokenMask
from cppo_lightning.module import RLVRModule
from cppo_lightning.observers import GateObserver
from cppo_lightning.sequences import MicroBatch
from cppo_lightning.trust_regions import CPPO, PPOClip
from tests.test_fit import make_data, make_module, make_trainer

if TYPE_CHECKING:
    from lightning.pytorch import Callback

# what hands a tensor's values, or a number that depends on them, to the host
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "masked_select"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc", "lift_fresh"),
}
READING = {"tolist", "numpy", "cpu", "__array__", "item"}  # of a tensor on the CPU no operation shows it
ALLOWED = {
    # transformers asks once per forward pass of plain causal attention, before the first layer, whether positions begin anew;
    # no argument of its models leaves that out
    "find_packed_sequence_indices",
}
NOT_WATCHED = {
    "GateMetrics",  # what several of them have in common
    "RolloutRecorder",  # writes every token's numbers to disk, which is what it is for; no config of the package has it
}


class Waits(TorchDispatchMode):
    """Notes the operations that would wait for an accelerator, with the functions that call them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0
        self._calls = Calls(self)

    def __enter__(self) -> Any:
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen += 1
        name = func._overloadpacket.__name__
        out = func(*args, **kwargs)
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        by_mask = name.startswith(("index", "_index_put")) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if isinstance(args[1], list | tuple) else [])
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        crosses = name in ("_to_copy", "copy_") and len(devices) > 1
        if name in WAITING or by_mask or unsized or crosses:
            self.note(name)
        return out

    def note(self, name: str) -> None:
        callers = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        if not ALLOWED & {frame.name for frame in callers}:
            self.found.append(f"{name} in " + " > ".join(f"{frame.name}:{frame.lineno}" for frame in callers[-6:]))


class Calls(TorchFunctionMode):
    """Notes the calls that read a tensor's values without an operation."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING:
            self.waits.note(func.__name__)
        return func(*args, **(kwargs or {}))


class CopiesToMeta(TorchFunctionMode):
    """Deep copies of tensors made inside are on the meta device, whose values nobody can read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].to("meta") if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


@contextmanager
def on_another_device(module: Any) -> Iterator[None]:
    """Copies of the policies and of callbacks that look at gates, all on the meta device."""
    kept = module.policy, module.reference, module.trainer.callbacks
    with pytest.MonkeyPatch.context() as patch, CopiesToMeta():
        patch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
        patch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # which this device has not
        patch.setattr(torch, "autocast", lambda *device, **settings: nullcontext())
        policies = [None if policy is None else deepcopy(policy).to("meta") for policy in kept[:2]]
        looking_on = [deepcopy(each) if isinstance(each, GateObserver) else each for each in kept[2]]
        module.policy, module.reference, module.trainer.callbacks = *policies, looking_on
        try:
            yield
        finally:
            module.policy, module.reference, module.trainer.callbacks = kept


def to_meta(part: MicroBatch, totals: Totals) -> tuple[MicroBatch, Totals]:
    moved = MicroBatch(part.batch.to("meta"), part.sequences.to("meta"))
    return moved, Totals(totals.tokens.to("meta"), totals.sequences.to("meta"))


REGIONS: dict[str, dict[str, Any]] = {
    "CPPO": {"trust_region": CPPO(TopKTV(5), delta=0.06), "reference_kl": ReferenceKL(0.01)},
    "PPOClip": {"trust_region": PPOClip(), "anchor": "recomputed", "mismatch": TokenMask()},
}


def run(model: Path, folder: Path, name: str, accelerator: str = "cpu") -> None:
    """Two rollouts of two updates under every callback of the package that looks at gates."""
    watching = [getattr(callbacks, name) for name in callbacks.__all__ if name not in NOT_WATCHED]
    looking_on = [cast("Callback", kind()) for kind in watching if issubclass(kind, GateObserver)]
    assert len(looking_on) >= 9
    data = make_data(model)
    module = make_module(model, micro_batch_tokens=300, **REGIONS[name])
    try:
        make_trainer(folder, looking_on, rollouts=2, accelerator=accelerator).fit(module, datamodule=data)
    finally:
        data.close()


@pytest.mark.parametrize("name", REGIONS)
def test_a_micro_batch_waits_for_nothing(
    name: str, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every micro-batch of a run, with its backward pass; and one of them on a device that gives no values away."""
    accumulate, found, seen = RLVRModule._accumulate, list[str](), list[int]()

    def watched(module: RLVRModule, part: MicroBatch, totals: Totals) -> Tensor:
        with Waits() as waits:
            shares = accumulate(module, part, totals)
        found.extend(waits.found)
        seen.append(waits.seen)
        if module.global_step == 1 and len(seen) % 2 == 0:
            with on_another_device(module):
                moved = to_meta(part, totals)
                accumulate(module, *moved)  # sums follow the values to their device once in a run
                with Waits() as waits:
                    assert accumulate(module, *moved).is_meta
            found.extend(waits.found)
            seen.append(waits.seen)
        return shares

    monkeypatch.setattr(RLVRModule, "_accumulate", watched)
    run(tiny_model_path, tmp_path, name)
    assert len(seen) >= 5
    assert min(seen) > 300  # operations: layers and callbacks, forwards and backwards
    assert not found, "\n".join(dict.fromkeys(found))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", REGIONS)
def test_cuda_itself_sees_no_wait(name: str, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate, packed = RLVRModule._accumulate, masking_utils.find_packed_sequence_indices

    @contextmanager
    def mode(value: str) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(value)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def watched(module: RLVRModule, part: MicroBatch, totals: Totals) -> Tensor:
        with mode("error" if module.global_step else "default"):  # sums follow the values to their device in the first update
            return accumulate(module, part, totals)

    def allowed(positions: Tensor) -> Tensor | None:
        with mode("default"):
            return packed(positions)

    monkeypatch.setattr(RLVRModule, "_accumulate", watched)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", allowed)
    run(tiny_model_path, tmp_path, name, accelerator="cuda")


VALUES = torch.tensor([1.0, 2.0, -1.0])
WAITING_CALLS: dict[str, Callable[[Tensor], object]] = {
    "a truth value": lambda x: bool((x > 0).all()),
    "a number": lambda x: float(x.sum()),
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.numpy(),
    "what a mask selects": lambda x: x[x > 0],
    "writing where a mask says": lambda x: x.clone().__setitem__(x > 0, 1.0),
    "places": lambda x: x.nonzero(),
    "unique values": lambda x: x.unique(),
    "equality": lambda x: torch.equal(x, x),
    "repeats": lambda x: x.repeat_interleave(torch.tensor([1, 2, 3])),
    "numbers of the host": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "a copy to another device": lambda x: x.to("meta"),
    "a copy into another device": lambda x: torch.empty(3, device="meta").copy_(x),
}


@pytest.mark.parametrize("call", WAITING_CALLS)
def test_what_waits_is_noticed(call: str) -> None:
    with Waits() as waits:
        WAITING_CALLS[call](VALUES)
    assert waits.found


def test_what_does_not_wait_is_not_noticed() -> None:
    with Waits() as waits:
        ordered = VALUES.masked_fill(VALUES > 0, 0.0).cumsum(0)[VALUES.argsort()]
        (ordered.new_full((), 3.0) + ordered.to(torch.float64).sum()).clamp(min=0)
    assert waits.seen > 5
    assert not waits.found
