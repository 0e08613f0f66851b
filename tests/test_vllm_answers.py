"""What trainer and vLLM servers send each other to sample, with and without vLLM."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cppo_lightning.engines.engine import Sampling
from cppo_lightning.engines.vllm import settings
from cppo_lightning.engines.vllm.capture import CapturedResponse, LogProbs
from cppo_lightning.engines.vllm_server.answers import PATH, Answer, request_body
from cppo_lightning.engines.vllm_server.client import Patience, Server
from cppo_lightning.engines.vllm_server.engine import VLLMServerEngine
from cppo_lightning.engines.vllm_server.sampling import sampled
from cppo_lightning.errors import ConfigError, RolloutError

from . import fake_vllm_server
from .test_vllm_engine import needs_vllm, oracle_logp

URL = "http://node-7:8000"
PROMPT = list(range(10, 50))


def log_probs(*steps: tuple[list[int], list[float]], k: int = 2) -> LogProbs:
    gathered = LogProbs(k)
    for tokens, logp in steps:
        gathered.add(np.array([tokens]), np.array([logp], np.float32))
    return gathered


SAMPLED_OUTSIDE_TOP_2 = ([7, 1, 2], [-3.0, -0.5, -1.0])
CERTAIN = ([2, 2, 4], [0.0, 0.0, -np.inf])


def answer(**changes: Any) -> Answer:
    """Two samples, of two tokens and of one."""
    whole = {
        "ids": [[7, 2], [2]],
        "reasons": ["stop", "length"],
        "logprobs": [log_probs(SAMPLED_OUTSIDE_TOP_2, CERTAIN), log_probs(CERTAIN)],
        "labels": ["run/1", "run/1"],
    }
    return Answer.of(**{**whole, **changes})


class TestLogProbs:
    def test_are_those_of_each_step_and_keep_nothing_of_it(self) -> None:
        """Steps of one to three tokens, some wider than asked for, whose arrays are written over afterwards."""
        random, gathered, expected = np.random.default_rng(0), LogProbs(4), []
        for step in range(50):
            rows, width = step % 3 + 1, 5 + step % 2
            tokens, logp = random.integers(0, 2**31, (rows, width)), random.normal(size=(rows, width)).astype(np.float32)
            expected.append((tokens[:, :5].copy(), logp[:, :5].copy()))
            gathered.add(tokens, logp)
            tokens[:], logp[:] = 0, 0
        for found, wanted in zip(gathered.arrays(), zip(*expected, strict=True), strict=True):
            assert np.array_equal(found, np.concatenate(wanted))
        assert [array.dtype for array in gathered.arrays()] == [np.int32, np.float32]

    def test_of_nothing(self) -> None:
        assert [array.shape for array in LogProbs(4).arrays()] == [(0, 5), (0, 5)]
        with pytest.raises(RolloutError, match="no log-probabilities for sample 3"):
            CapturedResponse(3, 4).completion("stop")


class TestAnswers:
    def test_come_back_as_they_were(self) -> None:
        back = Answer.from_bytes(answer().to_bytes(), URL)
        assert back.labels.tolist() == ["run/1"]
        (first, one), (second, other) = back.completions(5, 2, 2)
        assert (first, one.finished, one.ids.tolist()) == (5, True, [7, 2])
        assert (second, other.finished, other.ids.tolist()) == (6, False, [2])
        assert one.logp.tolist() == [-3.0, 0.0]
        assert one.topk_ids is not None
        assert one.topk_logp is not None
        assert one.topk_ids.tolist() == [[1, 2], [2, 4]]
        assert one.topk_logp.tolist() == [[-0.5, -1.0], [0.0, -torch.inf]]
        dtypes = [tensor.dtype for tensor in (one.ids, one.logp, one.topk_ids, one.topk_logp)]
        assert dtypes == [torch.int64, torch.float32, torch.int64, torch.float32]
        assert one.topk_logp.untyped_storage().nbytes() == 16, "a response that is kept keeps no other"

    def test_without_top_k(self) -> None:
        plain = Answer.of([[7]], ["stop"], [log_probs(([7], [-3.0]), k=0)], ["run/1"])
        ((_, completion),) = Answer.from_bytes(plain.to_bytes(), URL).completions(0, 1, 0)
        assert (completion.logp.tolist(), completion.topk_ids, completion.topk_logp) == ([-3.0], None, None)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"reasons": ["stop", "abort"]}, "sample 6 by 'abort'"),
            ({"ids": [[7, 3], [2]]}, "sample 5 belong to other tokens"),
            ({"ids": [[], [2]], "logprobs": [log_probs(), log_probs(CERTAIN)]}, "no log-probabilities for sample 5"),
        ],
    )
    def test_what_must_not_be_trained_on(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(RolloutError, match=message):
            list(answer(**changes).completions(5, 2, 2))

    def test_of_another_request(self) -> None:
        with pytest.raises(RolloutError, match="2 samples of a prompt, not 3"):
            list(answer().completions(0, 3, 2))
        with pytest.raises(RolloutError, match="2 top log-probabilities per token, not 4"):
            list(answer().completions(0, 2, 4))

    def test_of_samples_without_all_log_probabilities(self) -> None:
        with pytest.raises(ValueError, match=r"drew \[2, 1\] tokens and returned log-probabilities of \[1, 1\]"):
            answer(logprobs=[log_probs(CERTAIN), log_probs(CERTAIN)])

    @pytest.mark.parametrize("data", [b"", b"{}", answer().to_bytes()[:-40], b"\x80\x04N."])
    def test_that_are_none(self, data: bytes) -> None:
        with pytest.raises(RolloutError, match="what http://node-7:8000 answered cannot be read"):
            Answer.from_bytes(data, URL)


def test_a_request_says_all_about_sampling() -> None:
    @dataclass(frozen=True)
    class More(Sampling):
        typical_p: float = 0.7

    sampling = More(max_tokens=3, temperature=0.5, top_p=0.9, top_k=4, min_p=0.1)
    sent = request_body(PROMPT, 0, 2, sampling, 5, seed=1, eos=[0, 9])["sampling_params"]
    assert sent == sent | asdict(sampling) | {"n": 2, "stop_token_ids": [0, 9], "logprobs": 5}


class TestVersions:
    def test_of_a_server_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(settings.ANY_VERSION, raising=False)
        settings.check_version("0.32.1", "VLLMServerEngine", URL)
        for version in ("0.31.2", "0.33.0", "1.0"):
            message = rf"vLLM {version} is installed at http://node-7:8000, .* tested with >=0\.32,<0\.33; .* CPPO_ANY_VLLM=1"
            with pytest.raises(ConfigError, match=message):
                settings.check_version(version, "VLLMServerEngine", URL)
        monkeypatch.setenv(settings.ANY_VERSION, "1")
        with pytest.warns(UserWarning, match=r"vLLM 0\.33\.0 is installed at .* WeightSyncCanary"):
            settings.check_version("0.33.0", "VLLMServerEngine", URL)


class TestTheRightWeights:
    """A server that says it has them, and then draws with others."""

    @pytest.fixture
    def server(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
        for name, value in (("key", "secret"), ("label", "run/2")):
            monkeypatch.setitem(fake_vllm_server.state, name, value)
        http = fake_vllm_server.Server(("127.0.0.1", 0), fake_vllm_server.Handler)
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield Server(f"http://127.0.0.1:{http.server_address[1]}", "secret", Patience(stall=60))
        http.shutdown()
        http.server_close()
        thread.join()

    def answers(self, server: Server, monkeypatch: pytest.MonkeyPatch, *drawn_with: list[str]) -> list[tuple[int, Answer]]:
        """What one prompt gets from a server that answers with the labels ``drawn_with``, one after the other."""
        labels = iter(drawn_with)
        monkeypatch.setattr(fake_vllm_server, "answer", lambda _: answer(labels=next(labels)).to_bytes())
        return list(sampled([body(2, 2)], [server], "run/2", Patience(stall=60), lambda: None))

    def test_are_waited_for(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        ((number, found),) = self.answers(server, monkeypatch, ["run/1", "run/2"], ["run/2", "run/2"])
        assert (number, found.labels.tolist()) == (0, ["run/2"])

    def test_or_nothing_is_sampled(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(RolloutError, match=r"failed 3 times .* drawn with the weights \['run/1', 'run/2'\]"):
            self.answers(server, monkeypatch, [""], ["run/1"], ["run/2", "run/1"])


@pytest.fixture(scope="module")
def engine(tiny_model_path: Path) -> Iterator[VLLMServerEngine]:
    """With two API processes for one engine core: whichever a request reaches, its answer is the same.

    Few samples at a time, so that a request for many lasts, however far the API lags behind the core.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        engine = VLLMServerEngine(
            max_model_len=512, max_top_logprobs=20, engine_args={"api_server_count": 2, "max_num_seqs": 8}
        )
        engine.start(str(tiny_model_path))
    yield engine
    engine.close()


def posted(server: Server, body: dict[str, Any], timeout: float = 60) -> httpx.Response:
    return httpx.post(server.url + PATH, json=body, headers=server.headers, timeout=timeout, trust_env=False)


def body(n: int = 1, k: int = 0, max_tokens: int = 8, **changes: Any) -> dict[str, Any]:
    return request_body(PROMPT, 0, n, Sampling(max_tokens=max_tokens, **changes), k, seed=1, eos=[0])


class TestTheRoute:
    pytestmark = needs_vllm

    def test_several_ks_at_once_under_truncation(self, engine: VLLMServerEngine, tiny_model_path: Path) -> None:
        """What is never drawn has -inf, and nothing depends on the K that responses beside it in the same steps have."""
        model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
        found: dict[int, Answer] = {}

        def ask(k: int) -> None:
            found[k] = Answer.from_bytes(posted(engine._servers[0], body(4, k, 64, top_k=10)).content, URL)

        threads = [threading.Thread(target=ask, args=(k,)) for k in (0, 3, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        ids = [completion.ids for _, completion in found[20].completions(0, 4, 20)]
        for k, answered in found.items():
            for place, completion in answered.completions(0, 4, k):
                assert torch.equal(completion.ids, ids[place]), "K must not change what is drawn"
                full = oracle_logp(model, PROMPT, completion.ids, 1.0)
                kept = full.masked_fill(full < full.topk(10).values[:, -1:], -torch.inf).log_softmax(-1)
                expected = kept.gather(-1, completion.ids[:, None])[:, 0]
                torch.testing.assert_close(completion.logp, expected, rtol=0, atol=1e-3)
                if completion.topk_ids is None or completion.topk_logp is None:
                    continue
                finite = completion.topk_logp.isfinite()
                expected = kept.gather(-1, completion.topk_ids)[finite]
                torch.testing.assert_close(completion.topk_logp[finite], expected, rtol=0, atol=1e-3)
                assert bool((completion.topk_logp[:, 10:] == -torch.inf).all())
                assert bool(finite[:, :10].all())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"token_ids": []}, "prompt"),
            ({"token_ids": [-1]}, "greater than or equal to 0"),
            ({"token_ids": [10**6]}, "out of vocabulary"),
            ({"token_ids": [1] * 600}, "512"),
            ({"prompt": "text"}, "prompt"),
            ({"sampling_params": {"logprobs": 21}}, "21"),
            ({"sampling_params": {"logprobs": -1}}, "got -1"),
            ({"sampling_params": {}}, "got None"),
            ({"sampling_params": {"temperature": -1}}, "temperature"),
        ],
    )
    def test_what_it_refuses(self, engine: VLLMServerEngine, changes: dict[str, Any], message: str) -> None:
        response = posted(engine._servers[0], body() | changes)
        assert response.status_code == 400, response.text
        assert message in response.text

    def test_a_client_that_goes_away_calls_off_its_samples(self, engine: VLLMServerEngine) -> None:
        n = 1024  # minutes of sampling, beside which it does not matter how late the server hears of it
        server, whole = engine._servers[0], n * 460
        long = body(n, 20, 460)
        long["sampling_params"] |= {"stop_token_ids": [], "ignore_eos": True}

        async def drawn_in_vain() -> float:
            async with httpx.AsyncClient(base_url=server.url, headers=server.headers, trust_env=False, timeout=60) as http:

                async def drawn() -> float:
                    lines = (await http.get("/metrics")).text.splitlines()
                    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))

                before = await drawn()
                asked = asyncio.create_task(http.post(PATH, json=long))
                while await drawn() == before:
                    await asyncio.sleep(0.05)
                asked.cancel()
                while not (await http.post("/reset_prefix_cache")).json()["success"]:  # nothing is being sampled
                    await asyncio.sleep(0.05)
                return await drawn() - before

        # half of it, since the server counts what it has drawn a little later
        assert 0 < asyncio.run(asyncio.wait_for(drawn_in_vain(), 600)) < whole / 2
        assert posted(server, body()).is_success
