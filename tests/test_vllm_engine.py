"""vLLM in process against full forward passes of plain transformers, and what it leaves behind in the process."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cppo_lightning.engines.engine import Completion, Sampling
from cppo_lightning.engines.vllm.capture import CapturedResponse
from cppo_lightning.engines.vllm.engine import VLLMEngine
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.rollout import PromptTemplate, Sampler
from cppo_lightning.verifiers import Outcome, Problem, Verdict

needs_vllm = [pytest.mark.vllm, pytest.mark.slow]
PROBLEMS = [
    Problem(f"{a} + {b}", ({"role": "user", "content": f"Calculate {a} + {b}. Answer with only the number."},), str(a + b))
    for a, b in ((1, 2), (3, 4), (9, 8))
]


def process_state() -> dict[str, object]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": cast(Any, np.random.get_state())[1].tolist(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "dtype": torch.get_default_dtype(),
        "signals": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)},
        "affinity": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
        "environment": {key: os.environ.get(key) for key in ("LD_PRELOAD", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE")},
    }


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    chats = [problem.messages for problem in PROBLEMS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[VLLMEngine]:
    before = process_state()
    engine = VLLMEngine(dtype="float32", max_top_logprobs=20, max_model_len=512)
    engine.start(str(smollm2_path))
    assert process_state() == before, "starting vLLM should leave the trainer's process as it was"
    yield engine
    engine.close()
    engine.close()
    assert (engine.version, engine.checksums()) == (-1, None)
    assert not torch.distributed.is_initialized()


@torch.no_grad()
def oracle_logp(model: PreTrainedModel, prompt: Sequence[int], ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities ``[t, V]`` before each of ``ids``, by one forward pass without a cache."""
    logits = model(input_ids=torch.cat([torch.tensor(list(prompt)), ids])[None], use_cache=False).logits[0].float()
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def largest_difference(
    model: PreTrainedModel, completions: list[Completion], prompts: list[list[int]], n: int, temperature: float
) -> float:
    worst = 0.0
    for row, completion in enumerate(completions):
        expected = oracle_logp(model, prompts[row // n], completion.ids, temperature)
        worst = max(worst, float((completion.logp - expected.gather(-1, completion.ids[:, None])[:, 0]).abs().max()))
        if completion.topk_ids is not None and completion.topk_logp is not None:
            worst = max(worst, float((completion.topk_logp - expected.gather(-1, completion.topk_ids)).abs().max()))
            worst = max(worst, float((completion.topk_logp - expected.topk(completion.topk_ids.shape[1]).values).abs().max()))
    return worst


def assert_identical(one: Completion, other: Completion) -> None:
    assert one.finished == other.finished
    for name in ("ids", "logp", "topk_ids", "topk_logp"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


def by_vllm_itself(engine: VLLMEngine, prompts: list[list[int]], n: int, sampling: Sampling, k: int, seed: int) -> list[Any]:
    """``LLM.generate`` with its own objects for log-probabilities: a list of vLLM's CompletionOutput, prompt-major."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(
        n=n, max_tokens=sampling.max_tokens, temperature=sampling.temperature, logprobs=k, stop_token_ids=engine._eos
    )
    llm = engine._loaded()
    llm.reset_prefix_cache()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        answers = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False)
    return [sample for answer in answers for sample in answer.outputs]


class TestWithVLLM:
    pytestmark = needs_vllm

    @pytest.mark.parametrize("k", [0, 7])
    def test_tokens_and_log_probabilities_are_those_of_llm_generate(
        self, engine: VLLMEngine, prompts: list[list[int]], k: int
    ) -> None:
        sampling = Sampling(max_tokens=24, temperature=1.3)
        seen: dict[int, Completion] = {}
        completions = engine.generate(prompts, 6, sampling, k, seed=5, on_completion=seen.__setitem__)
        assert [seen[place] for place in range(18)] == completions
        assert list(seen) != sorted(seen), "responses of different lengths should not end in order"
        for completion, sample in zip(completions, by_vllm_itself(engine, prompts, 6, sampling, k, 5), strict=True):
            ids = list(sample.token_ids)
            assert completion.ids.tolist() == ids
            assert completion.finished == (sample.finish_reason == "stop")
            rows = sample.logprobs  # per token a dictionary: token id -> Logprob, with its rank
            expected = torch.tensor([row[i].logprob for i, row in zip(ids, rows, strict=True)])
            assert torch.equal(completion.logp, expected)
            if k:
                assert completion.topk_ids is not None
                assert completion.topk_logp is not None
                top = [sorted((lp.rank, i, lp.logprob) for i, lp in row.items() if lp.rank <= k) for row in rows]
                assert completion.topk_ids.tolist() == [[i for _, i, _ in row] for row in top]
                assert torch.equal(completion.topk_logp, torch.tensor([[logp for *_, logp in row] for row in top]))

    def test_what_on_completion_raises_comes_out_and_the_next_call_starts_clean(
        self, engine: VLLMEngine, prompts: list[list[int]]
    ) -> None:
        sampling = Sampling(max_tokens=24, temperature=1.3)
        expected = engine.generate(prompts, 6, sampling, 3, seed=5)
        before, seen = process_state(), []

        def stop(place: int, completion: Completion) -> None:
            seen.append(place)
            if len(seen) == 3:
                raise RuntimeError("enough")

        with pytest.raises(RuntimeError, match="enough"):
            engine.generate(prompts, 6, sampling, 3, seed=5, on_completion=stop)
        assert len(seen) == 3
        assert process_state() == before
        for one, other in zip(engine.generate(prompts, 6, sampling, 3, seed=5), expected, strict=True):
            assert_identical(one, other)

    def test_verdicts_come_while_later_responses_are_still_generated(self, engine: VLLMEngine, smollm2_path: Path) -> None:
        thread, futures, waited = ThreadPoolExecutor(1), list[Future[Verdict]](), 0

        class Pool:
            def submit(self, problem: Problem, response: str) -> Future[Verdict]:
                """Once the first response is here, vLLM does not go on before the verdict on it."""
                nonlocal waited
                futures.append(thread.submit(Verdict, Outcome.WRONG, 0.0, response))
                futures[0].result(timeout=60)
                waited += 1
                return futures[-1]

        sampler = Sampler(engine, AutoTokenizer.from_pretrained(smollm2_path), PromptTemplate(), cast(Any, Pool()))
        with thread:
            rollout = sampler.sample(PROBLEMS, 4, Sampling(max_tokens=12))
        assert waited == 12
        assert [s.verdict.extracted for s in rollout.samples] == [s.text for s in rollout.samples]
        lengths = [len(s.completion.ids) for s in rollout.samples]
        assert min(lengths) < max(lengths) == 12

    def test_logp_and_topk_equal_a_full_forward_pass(
        self, engine: VLLMEngine, model: PreTrainedModel, prompts: list[list[int]]
    ) -> None:
        completions = engine.generate(prompts, 4, Sampling(max_tokens=24, temperature=1.3), top_logprobs=5)
        assert len(completions) == 12
        assert largest_difference(model, completions, prompts, 4, 1.3) < 2e-4  # float32: 4e-5 at most met
        outside = 0
        for completion in completions:
            completion.check("row")
            assert completion.topk_ids is not None
            assert completion.topk_ids.shape == (len(completion.ids), 5)
            outside += int((completion.topk_ids != completion.ids[:, None]).all(-1).sum())
        assert outside > 0, "no sampled token was outside the top-K, so that case was not tested"

    def test_eos_is_part_of_the_response(self, engine: VLLMEngine, model: PreTrainedModel, prompts: list[list[int]]) -> None:
        eos = model.generation_config.eos_token_id
        completions = engine.generate(prompts, 8, Sampling(max_tokens=12))
        for completion in completions:
            assert eos not in completion.ids[:-1].tolist()
            assert completion.finished == (completion.ids[-1] == eos)
            assert completion.finished or len(completion.ids) == 12
            assert completion.topk_ids is None
        assert {c.finished for c in completions} == {True, False}

    def test_greedy_equals_transformers_generate(
        self, engine: VLLMEngine, model: PreTrainedModel, prompts: list[list[int]]
    ) -> None:
        completions = engine.generate(prompts, 1, Sampling(max_tokens=16, temperature=0), top_logprobs=3)
        for prompt, completion in zip(prompts, completions, strict=True):
            expected = cast(Any, model).generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
            assert completion.ids.tolist() == expected.tolist()
        assert largest_difference(model, completions, prompts, 1, 1.0) < 2e-4

    def test_reloaded_weights_show_in_the_log_probabilities_and_draws_repeat(
        self, engine: VLLMEngine, model: PreTrainedModel, prompts: list[list[int]], smollm2_path: Path
    ) -> None:
        changed = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(1.05)
        sampling = Sampling(max_tokens=16)

        def ids(seed: int) -> list[list[int]]:
            return [c.ids.tolist() for c in engine.generate(prompts, 4, sampling, seed=seed)]

        engine.load_weights(changed.named_parameters(), 3)  # without the tied head
        assert engine.version == 3
        before = process_state()
        completions = engine.generate(prompts, 4, sampling, top_logprobs=20)
        assert process_state() == before, "sampling should leave the trainer's random state and threads alone"
        assert largest_difference(changed, completions, prompts, 4, 1.0) < 2e-4
        assert largest_difference(model, completions, prompts, 4, 1.0) > 0.1
        second = ids(1)
        engine.load_weights(changed.state_dict().items(), 3)  # with it
        first = [c.ids.tolist() for c in completions]
        assert ids(0) == first
        assert ids(1) == second
        assert first != second
        engine.load_weights(model.named_parameters(), 4)
        completions = engine.generate(prompts, 4, sampling, top_logprobs=20)
        assert largest_difference(model, completions, prompts, 4, 1.0) < 2e-4

    def test_wrong_weights_are_refused_by_name_and_the_next_load_works(
        self, engine: VLLMEngine, model: PreTrainedModel, prompts: list[list[int]]
    ) -> None:
        weights = dict(model.named_parameters())
        with pytest.raises(RolloutError, match=r"no parameter 'model\.head'"):
            engine.load_weights([("model.head", torch.zeros(1))], 5)
        assert engine.version == -1
        with pytest.raises(RolloutError, match=r"missing 1: model\.norm\.weight"):
            engine.load_weights(((k, v) for k, v in weights.items() if k != "model.norm.weight"), 5)
        engine.load_weights(weights.items(), 5)
        completions = engine.generate(prompts, 1, Sampling(max_tokens=8))
        assert largest_difference(model, completions, prompts, 1, 1.0) < 2e-4

    def test_a_load_that_broke_off_within_a_fused_layer_leaves_nothing_in_the_next(
        self, engine: VLLMEngine, model: PreTrainedModel, prompts: list[list[int]]
    ) -> None:
        def until_q() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in model.named_parameters():
                yield name, 2 * tensor.detach()
                if name.endswith("q_proj.weight"):
                    raise OSError("the trainer broke off")

        def drawn() -> list[Completion]:
            return engine.generate(prompts, 2, Sampling(max_tokens=8), top_logprobs=5, seed=1)

        engine.load_weights(model.named_parameters(), 6)
        expected = drawn()
        with pytest.raises(OSError, match="the trainer broke off"):
            engine.load_weights(until_q(), 7)
        engine.load_weights(model.named_parameters(), 8)
        for found, whole in zip(drawn(), expected, strict=True):
            assert_identical(found, whole)

    def test_on_cuda_the_seeds_of_requests_follow_from_that_of_the_call(
        self, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What vLLM's Model Runner V2, which CUDA takes, gives requests that come without a seed."""
        from vllm.v1.worker.gpu.sample import states

        def on_the_cpu(size: int, dtype: torch.dtype) -> SimpleNamespace:
            return SimpleNamespace(np=torch.zeros(size, dtype=dtype).numpy(), copy_to_uva=lambda: None)

        drawn: list[list[int]] = []

        def take(core: Any, prompts: Any, n: int, params: Any, completions: Any) -> None:
            held = states.SamplingStates(3, 100)
            for request in range(3):
                held.add_request(request, params)
            drawn.append(held.seeds.np.tolist())

        monkeypatch.setattr(states, "UvaBackedTensor", on_the_cpu)
        monkeypatch.setattr(engine, "_run", take)
        seeds = (0, 1, 2**32, 2**32 + 1, 2**63 - 1)
        for seed in (*seeds, *seeds):
            engine.generate([], 1, Sampling(max_tokens=4), seed=seed)
        assert drawn[:5] == drawn[5:]
        assert len({request for call in drawn for request in call}) == 15

    def test_requests_that_cannot_work(self, engine: VLLMEngine, prompts: list[list[int]]) -> None:
        with pytest.raises(ConfigError, match=r"top_logprobs 21 .* 20"):
            engine.generate(prompts, 1, Sampling(max_tokens=4), top_logprobs=21)
        with pytest.raises(ConfigError, match=r"max_tokens 500 .* 512"):
            engine.generate(prompts, 1, Sampling(max_tokens=500))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dtype": "float8"}, r"engine\.dtype .* 'float8'"),
            ({"max_top_logprobs": -1}, r"engine\.max_top_logprobs .* -1"),
            ({"gpu_memory_utilization": 0.0}, r"engine\.gpu_memory_utilization .* 0\.0"),
            ({"max_model_len": 1}, r"engine\.max_model_len .* 1"),
            ({"engine_args": {"seed": 1}}, r"engine_args\.seed is set by the engine"),
        ],
    )
    def test_settings_that_cannot_work(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            VLLMEngine(**settings)

    def test_unknown_engine_arguments_are_named(self, smollm2_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"engine_args\.enforce_eagr"):
            VLLMEngine(engine_args={"enforce_eagr": True}).start(str(smollm2_path))


def captured(k: int, steps: list[tuple[list[int], list[list[int]]]]) -> CapturedResponse:
    """``steps`` are the drawn tokens and the tokens of the log-probabilities, each of which is minus its token."""
    response = CapturedResponse(4, k)
    for ids, tokens in steps:
        array = np.array(tokens, dtype=np.int32)
        response.add(ids, (array, -array.astype(np.float32), np.zeros(len(ids)), None))
    return response


def test_a_captured_response_has_one_row_per_token_however_many_came_at_once() -> None:
    steps = [([5], [[5, 7, 5, 9]]), ([1, 2], [[1, 2, 3, 4], [2, 8, 6, 4]])]  # wider than asked for; a step of two tokens
    completion = captured(2, steps).completion("length")
    completion.check("row")
    assert completion.ids.tolist() == [5, 1, 2]
    assert completion.logp.tolist() == [-5.0, -1.0, -2.0]
    assert completion.topk_ids is not None
    assert completion.topk_logp is not None
    assert completion.topk_ids.tolist() == [[7, 5], [2, 3], [8, 6]]
    assert torch.equal(completion.topk_logp, -completion.topk_ids.float())
    assert not completion.finished
    assert captured(0, steps).completion("stop").topk_ids is None


def test_captured_responses_that_are_wrong() -> None:
    with pytest.raises(RolloutError, match="sample 4 belong to other tokens"):
        captured(1, [([5], [[6, 5]])]).completion("stop")
    with pytest.raises(RolloutError, match="ended sample 4 by 'abort'"):
        captured(1, [([5], [[5, 5]])]).completion("abort")
    response = CapturedResponse(4, 1)
    response.add([5], None)
    with pytest.raises(RolloutError, match="no log-probabilities for sample 4"):
        response.completion("stop")
    response.add([6], (np.array([[6, 1]]), np.zeros((1, 2), dtype=np.float32)))
    with pytest.raises(RolloutError, match="belong to other tokens"):
        response.completion("stop")
    response = captured(1, [([5], [[5, 5]])])
    response.add([6], None)
    with pytest.raises(RolloutError, match="prompt 'row': the engine returned 2 tokens with 1 log-prob"):
        response.completion("stop").check("row")


def test_without_vllm_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; install it with: pip install 'cppo-lightning\[vllm\]'"):
        VLLMEngine()
