"""AdamW in one kernel: the same arithmetic, and checkpoints that do not care."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_fit import make_data, make_module, make_trainer, weights
from tests.test_resume import Saving


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_fused_step_is_the_plain_one(dtype: torch.dtype, rtol: float) -> None:
    """Against AdamW tensor by tensor in float64 of the same gradients; rtol is of the moves, which are some 20 roundings."""
    generator = torch.Generator().manual_seed(0)
    initial = torch.randn(513, 77, generator=generator).to(dtype)
    ours, exact = nn.Parameter(initial.clone()), nn.Parameter(initial.double())
    fused = torch.optim.AdamW([ours], lr=0.1, weight_decay=0.1, fused=True)
    plain = torch.optim.AdamW([exact], lr=0.1, weight_decay=0.1, foreach=False)
    for _ in range(5):
        gradient = torch.randn(initial.shape, generator=generator).to(dtype)
        ours.grad, exact.grad = gradient, gradient.double()
        for optimizer in (fused, plain):
            optimizer.step()
    moved = exact.detach() - initial
    assert (ours.detach() - exact.detach()).norm() <= rtol * moved.norm()


@pytest.mark.parametrize("before", [True, False])
def test_a_checkpoint_goes_on_under_the_other_setting(before: bool, tiny_model_path: Path, tmp_path: Path) -> None:
    """As the run that wrote it went on, whose setting is in the checkpoint: bit by bit."""

    def run(fused: bool, **settings: Any) -> list[Tensor]:
        module = make_module(tiny_model_path, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=fused))
        data = make_data(tiny_model_path)
        try:
            make_trainer(tmp_path, [Saving(tmp_path)], rollouts=2).fit(module, datamodule=data, **settings)
        finally:
            data.close()
        return weights(module)

    expected = run(before)
    ours = run(not before, ckpt_path=str(tmp_path / "rollout_2.ckpt"), weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    saved = torch.load(tmp_path / "rollout_2.ckpt", weights_only=True)["state_dict"].values()
    assert not all(torch.equal(a, b) for a, b in zip(saved, expected, strict=True))
