"""Products through oneDNN against float64, and where torch's own take over."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional
from torch.profiler import profile

from cppo_lightning import onednn
from cppo_lightning.onednn import OneDNNLinear, product, use_onednn

OPERATOR = "mkldnn::_linear_pointwise"
# torch.backends.mkldnn.flags sets all flags, of Intel's GPUs too
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="torch's own products are taken elsewhere")


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(24, 40, bias=bias, dtype=dtype)
    use_onednn(made)
    assert type(made) is OneDNNLinear
    return made


def products(run: object) -> int:
    """How many of oneDNN's a call makes."""
    assert callable(run)
    with profile() as seen:
        run()
    return sum(event.count for event in seen.key_averages() if event.key == OPERATOR)


@x86
def test_this_torch_has_the_operator() -> None:
    """Where it does not, everything still works, at half the speed: a new version of torch should not do that unseen."""
    assert products(lambda: product(torch.ones(2, 3), torch.ones(4, 3))) == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (2, 1, 3, 24), (0, 24), (24,)], ids=str)
@pytest.mark.parametrize("fast", [True, False])
def test_values_and_gradients(shape: tuple[int, ...], bias: bool, fast: bool) -> None:
    ours = layer(bias)
    exact = nn.Linear(24, 40, bias=bias, dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(shape, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    with torch.backends.mkldnn.flags(enabled=fast):
        y, wanted = ours(x), exact(x64)
        grad = torch.randn_like(y)
        y.backward(grad)
    wanted.backward(grad.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    for a, b in ((x, x64), *zip(ours.parameters(), exact.parameters(), strict=True)):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


@x86
@pytest.mark.parametrize(("input_too", "frozen", "count"), [(True, False, 3), (False, False, 2), (True, True, 2)])
def test_only_wanted_gradients_are_computed(input_too: bool, frozen: bool, count: int) -> None:
    ours = layer().requires_grad_(not frozen)
    x = torch.randn(7, 24, requires_grad=input_too)
    assert products(lambda: ours(x).sum().backward()) == count


@pytest.fixture
def mesh(tmp_path: object) -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    torch.distributed.destroy_process_group()


def test_torch_multiplies_what_it_must(mesh: DeviceMesh) -> None:
    """Other dtypes, autocast, compilers and sharded weights see an ``nn.Linear``."""
    x = torch.randn(7, 24)
    ours, plain = layer(), nn.Linear(24, 40)
    plain.load_state_dict(ours.state_dict())
    sharded = copy.deepcopy(ours)
    for name, parameter in list(sharded.named_parameters()):
        sharded.register_parameter(name, nn.Parameter(DTensor.from_local(parameter.detach(), mesh, [Replicate()])))
    whole = DTensor.from_local(x, mesh, [Replicate()])

    def everything() -> None:
        for dtype in (torch.bfloat16, torch.float64):
            assert torch.equal(
                layer(dtype=dtype)(x.to(dtype)), functional.linear(x.to(dtype), *layer(dtype=dtype).parameters())
            )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ours(x), plain(x))
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(ours(x), plain(x))
        assert torch.equal(torch.compile(ours, backend="eager", fullgraph=True)(x), plain(x))
        assert torch.equal(sharded(whole).full_tensor(), plain(x))

    assert products(everything) == 0


def test_an_unknown_operator_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_SCHEMA", "another")
    onednn._available.cache_clear()
    try:
        assert products(lambda: layer()(torch.randn(7, 24)).sum().backward()) == 0
    finally:
        onednn._available.cache_clear()


def test_a_model_keeps_its_parameters(tiny_model_path: object) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_path))
    before = dict(model.named_parameters())
    use_onednn(model)
    assert any(type(module) is OneDNNLinear for module in model.modules())
    assert not any(type(module) is nn.Linear for module in model.modules())
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    copied = copy.deepcopy(model)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(copied(ids).logits, model(ids).logits)
