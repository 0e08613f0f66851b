"""The embedded engine against full forward passes of plain transformers, and its draws against the distribution they claim."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MistralConfig, PreTrainedModel

from cppo_lightning.engines.draw import BLOCK, draw
from cppo_lightning.engines.engine import Completion, Sampling
from cppo_lightning.engines.transformers_engine import TransformersEngine
from cppo_lightning.errors import ConfigError, RolloutError

PROMPTS = [list(range(40, 47)), [90], list(range(100, 123)), [5, 200, 17]]
# float32 sums in another order; every difference met was below 5e-6
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 2e-5}


def plain_model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def started(path: Path, max_sequences: int = 64) -> TransformersEngine:
    engine = TransformersEngine(max_sequences=max_sequences, device="cpu")
    engine.start(str(path))
    return engine


@torch.no_grad()
def oracle_logp(model: PreTrainedModel, prompt: Sequence[int], ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities ``[t, V]`` before each of ``ids``, by one forward pass over prompt and response without a cache."""
    logits = model(input_ids=torch.cat([torch.tensor(list(prompt)), ids])[None], use_cache=False).logits[0].float()
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def assert_matches_oracle(
    model: PreTrainedModel,
    completions: list[Completion],
    n: int,
    temperature: float,
) -> None:
    for row, completion in enumerate(completions):
        expected = oracle_logp(model, PROMPTS[row // n], completion.ids, temperature)
        torch.testing.assert_close(completion.logp, expected.gather(-1, completion.ids[:, None])[:, 0], **TOLERANCE)
        if completion.topk_ids is not None and completion.topk_logp is not None:
            top = expected.topk(completion.topk_ids.shape[1])
            torch.testing.assert_close(completion.topk_logp, top.values, **TOLERANCE)
            torch.testing.assert_close(completion.topk_logp, expected.gather(-1, completion.topk_ids), **TOLERANCE)
            completion.check("row")


def assert_identical(one: Completion, other: Completion) -> None:
    assert one.finished == other.finished
    for name in ("ids", "logp", "topk_ids", "topk_logp"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


@pytest.fixture(scope="module")
def other_models(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> dict[str, Path]:
    """Random models whose caches, positions or tied heads differ from the tiny Qwen3's."""
    common: dict[str, Any] = {
        "vocab_size": 260,
        "eos_token_id": 258,
        "bos_token_id": 257,
        "pad_token_id": 256,
        "initializer_range": 0.1,
    }
    llama_like: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    configs = {
        "mistral": MistralConfig(**common, **llama_like, num_key_value_heads=2, sliding_window=8),
        # one layer with a window, one without; logits capped; head tied to the embedding
        "gemma2": Gemma2Config(**common, **llama_like, num_key_value_heads=1, sliding_window=8),
        "gpt2": GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    }
    paths = {}
    for name, config in configs.items():
        paths[name] = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(config).float().save_pretrained(paths[name])
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_model_path / file, paths[name])
    return paths


def test_logp_and_topk_equal_a_full_forward_pass_while_rows_leave(tiny_model_path: Path) -> None:
    completions = started(tiny_model_path).generate(PROMPTS, 16, Sampling(max_tokens=60, temperature=0.8), top_logprobs=7)
    lengths = {len(c.ids) for c in completions}
    assert len(lengths) > 5, "rows should leave at different steps, or the compaction of the batch is not tested"
    assert_matches_oracle(plain_model(tiny_model_path), completions, 16, 0.8)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt2"])
def test_other_architectures_equal_a_full_forward_pass(other_models: dict[str, Path], name: str) -> None:
    # 23 + 40 tokens pass the window of 8
    completions = started(other_models[name]).generate(PROMPTS, 6, Sampling(max_tokens=40), top_logprobs=5)
    assert_matches_oracle(plain_model(other_models[name]), completions, 6, 1.0)


def test_responses_end_with_the_eos_token_or_at_the_limit(tiny_model_path: Path) -> None:
    eos = plain_model(tiny_model_path).generation_config.eos_token_id
    completions = started(tiny_model_path).generate(PROMPTS, 16, Sampling(max_tokens=60))
    for completion in completions:
        assert eos not in completion.ids[:-1].tolist()
        assert completion.finished == (completion.ids[-1] == eos)
        assert completion.finished or len(completion.ids) == 60
        assert completion.topk_ids is None
        assert completion.topk_logp is None
    assert {c.finished for c in completions} == {True, False}


def test_eos_tokens_are_those_of_the_generation_config_and_of_the_tokenizer(tiny_model_path: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    completions = started(tmp_path).generate(PROMPTS, 32, Sampling(max_tokens=60))
    assert {int(c.ids[-1]) for c in completions if c.finished} == {3, 4, 258}
    assert not {3, 4, 258} & {i for c in completions for i in c.ids[:-1].tolist()}


def test_greedy_equals_transformers_generate(tiny_model_path: Path) -> None:
    model = plain_model(tiny_model_path)
    completions = started(tiny_model_path).generate(PROMPTS, 1, Sampling(max_tokens=30, temperature=0))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = cast(Any, model).generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :]
        assert completion.ids.tolist() == expected.tolist()
    assert_matches_oracle(model, completions, 1, 1.0)


def test_a_prompt_gets_the_same_answer_alone_and_left_padded_in_a_batch(tiny_model_path: Path) -> None:
    engine = started(tiny_model_path)
    sampling = Sampling(max_tokens=30, temperature=0)
    together = engine.generate(PROMPTS, 1, sampling, top_logprobs=4)
    for prompt, expected in zip(PROMPTS, together, strict=True):
        [alone] = engine.generate([prompt], 1, sampling, top_logprobs=4)
        assert alone.ids.tolist() == expected.ids.tolist()
        torch.testing.assert_close(alone.logp, expected.logp, **TOLERANCE)
        torch.testing.assert_close(alone.topk_logp, expected.topk_logp, **TOLERANCE)


def test_order_is_prompt_major_when_groups_are_split_over_batches(tiny_model_path: Path) -> None:
    completions = started(tiny_model_path, max_sequences=3).generate(PROMPTS, 4, Sampling(max_tokens=8), top_logprobs=3)
    assert len(completions) == 16
    assert_matches_oracle(plain_model(tiny_model_path), completions, 4, 1.0)


def test_draws_depend_on_the_seed_alone_and_leave_the_global_generator_alone(tiny_model_path: Path) -> None:
    sampling, engine = Sampling(max_tokens=20), started(tiny_model_path)

    def ids(seed: int) -> list[list[int]]:
        return [c.ids.tolist() for c in engine.generate(PROMPTS, 2, sampling, seed=seed)]

    state = torch.get_rng_state()
    first = ids(1)
    assert ids(2) != first
    assert ids(1) == first, "nothing that ran in between enters"
    engine.load_weights(plain_model(tiny_model_path).state_dict().items(), 5)
    assert ids(1) == first, "nor the version of the same weights"
    assert torch.equal(state, torch.get_rng_state())


def test_completions_are_handed_out_at_the_step_that_ends_them(tiny_model_path: Path) -> None:
    engine = started(tiny_model_path)
    sampling = Sampling(max_tokens=60, temperature=0.8)
    expected = engine.generate(PROMPTS, 16, sampling, top_logprobs=3, seed=2)
    steps, seen = 0, dict[int, Completion]()

    def count_step(*_: Any) -> None:
        nonlocal steps
        steps += 1

    def on_completion(place: int, completion: Completion) -> None:
        assert place not in seen
        assert steps == len(completion.ids), "prompts are read once, and each further pass draws one token more"
        seen[place] = completion

    assert engine._model is not None
    hook = engine._model.register_forward_hook(count_step)
    completions = engine.generate(PROMPTS, 16, sampling, top_logprobs=3, seed=2, on_completion=on_completion)
    hook.remove()
    assert list(seen) != sorted(seen)
    assert [id(seen[place]) for place in range(64)] == [id(completion) for completion in completions]
    for one, other in zip(completions, expected, strict=True):
        assert_identical(one, other)


def test_handed_out_completions_have_their_place_when_groups_are_split_over_batches(tiny_model_path: Path) -> None:
    seen: dict[int, Completion] = {}
    completions = started(tiny_model_path, 3).generate(PROMPTS, 4, Sampling(max_tokens=8), on_completion=seen.__setitem__)
    assert [seen[place] for place in range(16)] == completions
    assert len(seen) == 16


def test_what_on_completion_raises_comes_out_and_the_engine_goes_on(tiny_model_path: Path) -> None:
    engine = started(tiny_model_path)
    sampling = Sampling(max_tokens=40)
    expected = engine.generate(PROMPTS, 8, sampling, seed=1)
    seen = []

    def stop(place: int, completion: Completion) -> None:
        seen.append(place)
        if len(seen) == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        engine.generate(PROMPTS, 8, sampling, seed=1, on_completion=stop)
    assert len(seen) == 3
    for one, other in zip(engine.generate(PROMPTS, 8, sampling, seed=1), expected, strict=True):
        assert_identical(one, other)


def test_load_weights_replaces_the_model_and_its_version(tiny_model_path: Path) -> None:
    engine = started(tiny_model_path)
    assert engine.version == -1
    model = plain_model(tiny_model_path)
    before = engine.generate(PROMPTS, 2, Sampling(max_tokens=10))
    assert_matches_oracle(model, before, 2, 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1).copy_(parameter.bfloat16())  # exact in bfloat16, the dtype sent below
    # bfloat16 parameters that require a gradient, as a trainer's do
    engine.load_weights(((name, p.bfloat16()) for name, p in model.named_parameters()), 7)
    assert engine.version == 7
    after = engine.generate(PROMPTS, 2, Sampling(max_tokens=10))
    assert_matches_oracle(model, after, 2, 1.0)
    changed = oracle_logp(model, PROMPTS[0], before[0].ids).gather(-1, before[0].ids[:, None])[:, 0] - before[0].logp
    assert float(changed.abs().max()) > 0.01, "the scaling should show in the log-probabilities, or nothing was tested"
    engine.close()
    engine.start(str(tiny_model_path))
    assert engine.version == -1, "what it has loaded anew is not the trainer's"


@pytest.mark.parametrize("tied_name_sent", [True, False])
def test_tied_heads_may_be_left_out(other_models: dict[str, Path], tied_name_sent: bool) -> None:
    model = plain_model(other_models["gemma2"])
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").mul_(0.5)
    weights = dict(model.state_dict() if tied_name_sent else model.named_parameters())
    assert ("lm_head.weight" in weights) == tied_name_sent
    engine = started(other_models["gemma2"])
    engine.load_weights(weights.items(), 1)
    assert_matches_oracle(model, engine.generate(PROMPTS, 2, Sampling(max_tokens=6)), 2, 1.0)


def test_wrong_weights_are_refused_by_name(tiny_model_path: Path) -> None:
    engine = started(tiny_model_path)
    weights = dict(plain_model(tiny_model_path).named_parameters())
    engine.load_weights(weights.items(), 3)
    with pytest.raises(RolloutError, match=r"no parameter 'model.head.weight'"):
        engine.load_weights({**weights, "model.head.weight": torch.zeros(1)}.items(), 4)
    assert engine.version == -1, "half-loaded weights have no version"
    with pytest.raises(RolloutError, match=r"'lm_head.weight' is \[260, 64\].*got \[2, 2\]"):
        engine.load_weights({**weights, "lm_head.weight": torch.zeros(2, 2)}.items(), 4)
    del weights["model.norm.weight"]
    with pytest.raises(RolloutError, match=r"missing 1: model.norm.weight"):
        engine.load_weights(weights.items(), 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float8"}, "engine.dtype .* 'float8'"),
        ({"max_sequences": 0}, "engine.max_sequences .* 0"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformersEngine(**settings)


def test_models_and_requests_that_cannot_work(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder or hub id"):
        started(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="'warp'"):
        TransformersEngine(device="warp").start(str(tiny_model_path))
    with pytest.raises(RolloutError, match="start"):
        TransformersEngine().generate(PROMPTS, 1, Sampling())
    engine = started(tiny_model_path)
    with pytest.raises(ConfigError, match=r"top_logprobs .*260.* 261"):
        engine.generate(PROMPTS, 1, Sampling(max_tokens=4), top_logprobs=261)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        engine.generate(PROMPTS, 0, Sampling(max_tokens=4))
    with pytest.raises(ConfigError, match=r"max_tokens 2030.*2048.*at most 2025"):
        engine.generate(PROMPTS, 1, Sampling(max_tokens=2030))
    with pytest.raises(RolloutError, match="prompt 1 of 2 has no tokens"):
        engine.generate([[1], []], 1, Sampling(max_tokens=4))
    engine.close()
    engine.close()
    with pytest.raises(RolloutError, match="start"):
        engine.generate(PROMPTS, 1, Sampling())


def test_a_draw_is_where_its_uniform_number_falls_in_the_float64_cdf() -> None:
    """Over several blocks, one of them impossible and the last one short; 1e-6 is what float32 sums may move a border by."""
    rows, vocabulary = 4000, 3 * BLOCK + 17
    logits = 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    logits[BLOCK : 2 * BLOCK] = -math.inf
    drawn = draw(logits.repeat(rows, 1), Sampling(), 0, torch.Generator().manual_seed(1))
    uniform = torch.rand(rows, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))[:, 0]
    expected = logits.double().log_softmax(-1)
    ends = expected.exp().cumsum(-1)
    assert bool(((ends - expected.exp())[drawn.ids] < uniform + 1e-6).all())
    assert bool((uniform < ends[drawn.ids] + 1e-6).all())
    assert {int(i) // BLOCK for i in drawn.ids} == {0, 2, 3}
    torch.testing.assert_close(drawn.logp.double(), expected[drawn.ids], rtol=0, atol=2e-6)


def test_logits_that_are_not_numbers_draw_a_token_with_no_log_probability() -> None:
    drawn = draw(torch.full((2, BLOCK + 7), math.nan), Sampling(), 1, torch.Generator())
    assert bool((drawn.ids < BLOCK + 7).all())
    assert bool(drawn.logp.isnan().all())


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 200,000 draws: 7 degrees of freedom stay below 24.3 with probability 0.999, and the seed is fixed."""
    probs = torch.tensor([0.4, 0.0, 0.25, 0.15, 0.1, 0.06, 0.03, 0.009, 0.001])
    temperature = 0.5
    logits = probs.log() * temperature  # so that the temperature restores probs
    drawn = draw(logits.repeat(200_000, 1), Sampling(temperature=temperature), 0, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn.ids, minlength=9).double()
    assert counts[1] == 0
    expected = probs.double() * 200_000
    kept = expected > 0
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 24.3
    torch.testing.assert_close(drawn.logp, probs.log()[drawn.ids], rtol=0, atol=1e-5)


def kept_tokens(probs: list[float], sampling: Sampling) -> set[int]:
    """Min-p, then top-k, then top-p, written slowly."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    order = [i for i in order if probs[i] >= sampling.min_p * probs[order[0]]]
    order = order[: sampling.top_k or None]
    total, mass, kept = sum(probs[i] for i in order), 0.0, set()
    for i in order:
        kept.add(i)
        mass += probs[i] / total
        if mass >= sampling.top_p:
            break
    return kept


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_p=0.6),
        Sampling(top_p=0.97, temperature=2.0),  # 400 and more tokens: past the guess, through the full sort
        Sampling(top_k=5),
        Sampling(min_p=0.2),
        Sampling(top_p=0.7, top_k=40, min_p=0.02, temperature=0.7),
    ],
    ids=str,
)
def test_truncated_draws_are_of_the_renormalised_kept_set(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 700, generator=generator) * 2
    rows = 400
    drawn = draw(logits.repeat_interleave(rows, 0), sampling, 10, generator)
    assert drawn.topk_ids is not None
    assert drawn.topk_logp is not None
    for row, probs in enumerate((logits / sampling.temperature).double().softmax(-1).tolist()):
        kept = kept_tokens(probs, sampling)
        here = slice(row * rows, (row + 1) * rows)
        assert set(drawn.ids[here].tolist()) <= kept
        total = math.log(sum(probs[i] for i in kept))
        expected = torch.tensor([math.log(probs[i]) - total for i in drawn.ids[here].tolist()])
        torch.testing.assert_close(drawn.logp[here], expected, rtol=0, atol=1e-4)
        top = sorted(kept, key=lambda i: -probs[i])[:10]
        assert drawn.topk_ids[row * rows, : len(top)].tolist() == top
        assert bool((drawn.topk_logp[row * rows, len(top) :] == -math.inf).all())


def test_greedy_reports_log_probabilities_at_temperature_one_without_truncation() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    drawn = draw(logits.clone(), Sampling(temperature=0, top_k=1), 2, torch.Generator())
    expected = logits.log_softmax(-1)
    assert drawn.ids.tolist() == [1]
    torch.testing.assert_close(drawn.logp, expected[:, 1])
    torch.testing.assert_close(drawn.topk_logp, expected[:, [1, 2]])
