"""The policy's log-probabilities against the model's own logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.errors import ConfigError
from cppo_lightning.lora import LoRA
from cppo_lightning.policy import Policy
from cppo_lightning.policy_config import PolicyConfig
from tests.test_batch import make_batch


def from_logits(model: torch.nn.Module, batch: RolloutBatch, row: int, temperature: float) -> torch.Tensor:
    """Log-softmax ``[t, V]`` in float64 at one row's response tokens, without any padding."""
    prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
    response = batch.response_ids[row][batch.response_mask[row]]
    logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0].double()
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_log_softmax_of_the_models_logits(tiny_model_path: Path, temperature: float) -> None:
    batch = make_batch([3, 9, 1], [4, 1, 12])
    policy = Policy.load(PolicyConfig(str(tiny_model_path)))
    output = policy(batch, temperature)
    assert batch.topk_ids is not None
    for row in range(3):
        full, own = from_logits(policy.model, batch, row, temperature), batch.response_mask[row]
        ids = batch.response_ids[row][own]
        # 2e-5: float32 attention over padded and unpadded rows sums in different orders
        torch.testing.assert_close(output.logp[row][own].double(), full.gather(-1, ids[:, None]).squeeze(-1), rtol=0, atol=2e-5)
        torch.testing.assert_close(
            output.topk_logp[row][own].double(), full.gather(-1, batch.topk_ids[row][own]), rtol=0, atol=2e-5
        )
        torch.testing.assert_close(output.entropy[row][own].double(), -(full.exp() * full).sum(-1), rtol=0, atol=2e-5)
    assert torch.equal(output.logp[~batch.response_mask], torch.zeros(int((~batch.response_mask).sum())))


def test_gradient_equals_that_of_the_models_logits(tiny_model_path: Path) -> None:
    batch = make_batch([3, 9], [4, 12])
    policy = Policy.load(PolicyConfig(str(tiny_model_path)))
    logp = policy(batch, 1.0).logp
    assert not logp._is_view(), "FSDP2 warns of views that its hooks are on"
    logp.sum().backward()
    ours = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.zero_grad()
    for row in range(2):
        full = from_logits(policy.model, batch, row, 1.0)
        full.gather(-1, batch.response_ids[row][batch.response_mask[row]][:, None]).sum().backward()
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_gradient_checkpointing_changes_no_number(tiny_model_path: Path) -> None:
    batch, grads = make_batch([3, 9], [4, 12]), []
    for checkpointing in (False, True):
        policy = Policy.load(PolicyConfig(str(tiny_model_path), gradient_checkpointing=checkpointing))
        policy(batch, 1.0).logp.sum().backward()
        assert policy.model.is_gradient_checkpointing is checkpointing
        grads.append([p.grad for p in policy.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-6)


def test_untrained_tokens_inside_a_response_are_context(tiny_model_path: Path) -> None:
    policy = Policy.load(PolicyConfig(str(tiny_model_path)))
    batch = make_batch([3], [8])
    holes = batch.response_mask.clone()
    holes[0, 2:4] = False
    whole, partly = policy(batch, 1.0).logp, policy(replace(batch, response_mask=holes), 1.0).logp
    torch.testing.assert_close(partly, whole * holes)


def small(config_class: type, model_class: type, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
    return model_class(config_class(**sizes, **heads, initializer_range=0.5, **settings))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: small(Gemma2Config, Gemma2ForCausalLM, final_logit_softcapping=5.0), id="soft cap"),
        pytest.param(lambda: small(GraniteConfig, GraniteForCausalLM, logits_scaling=4.0), id="scaled logits"),
    ],
)
def test_heads_with_a_soft_cap_or_a_scale(model: object) -> None:
    policy = Policy(model())  # type: ignore[operator]
    policy.check_head()
    batch = replace(make_batch([3], [6], k=0))
    batch = replace(batch, prompt_ids=batch.prompt_ids % 80, response_ids=batch.response_ids % 80)
    full = from_logits(policy.model, batch, 0, 0.8)
    ours = policy(batch, 0.8).logp[0].double()
    torch.testing.assert_close(ours, full.gather(-1, batch.response_ids[0][:, None]).squeeze(-1), rtol=0, atol=2e-5)


def test_a_head_that_is_not_understood_is_refused(tiny_model_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    original = model.lm_head.forward
    model.lm_head.forward = lambda h: original(h) * 1.5
    with pytest.raises(ConfigError, match="changes logits after its output head"):
        Policy(model).check_head()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_head_whose_logits_are_no_numbers_is_refused(value: float, tiny_model_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    original = model.lm_head.forward
    model.lm_head.forward = lambda h: original(h).index_fill(-1, torch.tensor([3]), value)
    with pytest.raises(ConfigError, match="changes logits after its output head"):
        Policy(model).check_head()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: None, r"lacks 1 of its weights \(model\.layers\.1\.mlp\.up_proj\.weight\); they would be random"),
        (
            lambda weight: weight[:-1].clone(),
            r"another shape .* 1 of .*up_proj\.weight \[\d+, \d+\] instead of \[\d+, \d+\]",
        ),
    ],
)
def test_weights_that_would_be_random_are_refused(
    change: Callable[[Tensor], Tensor | None], message: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    """transformers only warns of them, and they would be trained on."""
    folder = Path(shutil.copytree(tiny_model_path, tmp_path / "model"))
    weights, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    changed = change(weights.pop(name))
    save_file(weights if changed is None else {**weights, name: changed}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        Policy.load(PolicyConfig(str(folder)))


def test_named_weights_are_the_models_own(tiny_model_path: Path) -> None:
    policy = Policy.load(PolicyConfig(str(tiny_model_path)))
    weights = dict(policy.named_weights())
    assert "model.layers.0.self_attn.q_proj.weight" in weights
    assert not any(w.requires_grad for w in weights.values())


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.policy.path .*does not exist"):
        PolicyConfig(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"has no config.json"):
        PolicyConfig(str(tmp_path))


def test_a_model_may_lie_in_the_home_folder(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_model_path.parent))
    assert PolicyConfig(f"~/{tiny_model_path.name}") == PolicyConfig(str(tiny_model_path))
    with pytest.raises(ConfigError, match=r"'~nobody-has-this-name/m' does not exist"):
        PolicyConfig("~nobody-has-this-name/m")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_have_the_models_dtype_with_weights_and_without(tiny_model_path: Path, dtype: Any) -> None:
    config = PolicyConfig(str(tiny_model_path), dtype=dtype, lora=LoRA(rank=3))
    held, planned = (
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in make(config).named_parameters()}
        for make in (Policy.load, Policy.without_weights)
    )
    assert held == planned
    assert {kind for _, kind, _ in held.values()} == {getattr(torch, dtype)}
    assert {trained for *_, trained in held.values()} == {True, False}
