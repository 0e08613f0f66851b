"""vLLM servers against the trainer's own log-probabilities; and servers without a model, killed and stopped at will."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cppo_lightning.engines.checksums import checksums
from cppo_lightning.engines.engine import Completion, Sampling
from cppo_lightning.engines.vllm_server import listener
from cppo_lightning.engines.vllm_server import process as vllm_process
from cppo_lightning.engines.vllm_server.client import Patience, Server, ServerAwayError
from cppo_lightning.engines.vllm_server.engine import VLLMServerEngine
from cppo_lightning.engines.vllm_server.fleet import Fleet
from cppo_lightning.engines.vllm_server.sampling import sampled
from cppo_lightning.engines.vllm_server.weight_folder import WeightFolder, write_weights
from cppo_lightning.engines.vllm_server.weight_transfer import ThroughFolder
from cppo_lightning.errors import ConfigError, RolloutError

from . import fake_vllm_server
from .test_vllm_engine import largest_difference, needs_vllm, oracle_logp

PROMPTS = [list(range(first, first + 40)) for first in (10, 60, 100, 150)]
KEY = "CPPO_VLLM_API_KEY"
PATIENT = Patience(start=300, stall=120, request=300, restarts=3)  # a server that is well never reaches these


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()


def scaled(model: PreTrainedModel, factor: float) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() * factor for name, parameter in model.named_parameters()}


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.ids.tolist() for completion in completions]


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"host": "0.0.0.0"}, rf"engine\.host '0\.0\.0\.0' .* variable {KEY}"),
            ({"host": "node-7"}, r"engine\.host 'node-7' can be reached from elsewhere"),
            ({"urls": ["http://node-7:8000"], "weights_folder": "w"}, rf"engine\.urls .* variable {KEY}"),
            ({"servers": 0}, r"engine\.servers must be at least 1, got 0"),
            ({"dtype": "float8"}, r"engine\.dtype .* 'float8'"),
            ({"engine_args": {"api_key": "x"}}, r"engine_args\.api_key is set by the engine; use .*api_key_env"),
            ({"engine_args": {"middleware": "x"}}, r"engine_args\.middleware is set by the engine"),
        ],
    )
    def test_that_cannot_work(self, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(KEY, raising=False)
        with pytest.raises(ConfigError, match=message):
            VLLMServerEngine(**settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"urls": ["http://node-7:8000"]}, r"needs engine\.weights_folder"),
            ({"urls": [], "weights_folder": "w"}, r"at least one running server"),
            ({"urls": ["http://a:1"], "servers": 2, "weights_folder": "w"}, r"without servers and engine_args"),
        ],
    )
    def test_of_urls(self, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(KEY, "secret")
        with pytest.raises(ConfigError, match=message):
            VLLMServerEngine(**settings)

    def test_patience(self) -> None:
        with pytest.raises(ConfigError, match=r"engine\.patience\.stall .* 0"):
            Patience(stall=0)
        with pytest.raises(ConfigError, match=r"engine\.patience\.restarts .* -1"):
            Patience(restarts=-1)

    def test_as_flags(self) -> None:
        given = {"enforce_eager": True, "enable_chunked_prefill": False, "seed": 3, "x": None, "hf_overrides": {"a": 1}}
        assert vllm_process.as_flags(given) == [
            *("--enforce-eager", "--no-enable-chunked-prefill", "--seed", "3", "--hf-overrides", '{"a": 1}')
        ]


class TestWeightFolder:
    WEIGHTS = {f"p{i}": torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)} | {
        "half": torch.arange(5.0).bfloat16(),
        "scalar": torch.tensor(2.0),
    }

    @pytest.mark.parametrize(("shard_bytes", "files"), [(1, 7), (100, 3), (10**6, 1)])
    def test_comes_back_bit_by_bit(self, tmp_path: Path, shard_bytes: int, files: int) -> None:
        write_weights(self.WEIGHTS.items(), tmp_path / "w", "run/1", shard_bytes)
        back = dict(WeightFolder(tmp_path / "w", "run/1").tensors())
        assert back.keys() == self.WEIGHTS.keys()
        assert all(back[name].dtype == t.dtype and torch.equal(back[name], t) for name, t in self.WEIGHTS.items())
        assert len(list((tmp_path / "w").glob("*.safetensors"))) == files

    def test_memory_that_is_used_again_and_tied_names(self, tmp_path: Path) -> None:
        buffer = torch.zeros(3)

        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            for i in range(3):
                yield f"p{i}", buffer.fill_(i)
            yield "tied", buffer

        write_weights(gathered(), tmp_path / "w", "run/1")
        found = {name: tensor[0].item() for name, tensor in WeightFolder(tmp_path / "w", "run/1").tensors()}
        assert found == {"p0": 0, "p1": 1, "p2": 2, "tied": 2}

    def test_an_error_midway_leaves_nothing(self, tmp_path: Path) -> None:
        def ends_early() -> Iterator[tuple[str, torch.Tensor]]:
            yield from list(self.WEIGHTS.items())[:3]
            raise RolloutError("no more")

        with pytest.raises(RolloutError, match="no more"):
            write_weights(ends_early(), tmp_path / "w", "run/1", shard_bytes=1)
        assert list(tmp_path.iterdir()) == []

    def test_what_is_not_whole_is_refused(self, tmp_path: Path) -> None:
        folder = tmp_path / "w"
        with pytest.raises(RolloutError, match=r"no weights in .* same path"):
            WeightFolder(folder, "run/1")
        write_weights(self.WEIGHTS.items(), folder, "run/1", shard_bytes=1)
        with pytest.raises(RolloutError, match=r"'run/1', not 'run/2'"):
            WeightFolder(folder, "run/2")
        file = folder / "00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(RolloutError, match=r"'p1' in .*00001.* is not what the trainer wrote"):
            list(WeightFolder(folder, "run/1").tensors())
        file.unlink()
        with pytest.raises(RolloutError, match="lacks 1 parameters, the first 'p1'"):
            list(WeightFolder(folder, "run/1").tensors())


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., VLLMServerEngine]]:
    """Makes engines whose servers are ``fake_vllm_server``, with ``tmp_path`` as their working folder."""
    fake_vllm_server.stand_in(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    made: list[VLLMServerEngine] = []

    def make(**settings: Any) -> VLLMServerEngine:
        made.append(VLLMServerEngine(**{"patience": PATIENT, "weights_folder": str(tmp_path / "folder"), **settings}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def group_of(engine: VLLMServerEngine, server: int = 0) -> int:
    """The process group of one of its servers."""
    assert engine._fleet is not None
    process = engine._fleet._keepers[server]._process
    assert process is not None
    assert process._process is not None
    return process._process.pid


def is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def eventually(holds: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


class TestServersThatFail:
    SAMPLING = Sampling(max_tokens=8)

    def prompts(self, count: int = 12) -> list[list[int]]:
        return [[1, 2, i] for i in range(count)]

    def test_killed_at_any_moment_every_prompt_is_answered_once(
        self, fakes: Callable[..., VLLMServerEngine], model: PreTrainedModel, tiny_model_path: Path
    ) -> None:
        """The same prompts under the same weights with and without kills: the same samples."""
        calm, engine = fakes(), fakes(servers=2)
        for each in (calm, engine):
            each.start(str(tiny_model_path))
        restarts = 0
        for rollout in range(4):
            weights = scaled(model, 1 + rollout)
            expected, seen = [], []
            for each in (calm, engine):
                each.load_weights(weights.items(), rollout)
            expected = tokens(calm.generate(self.prompts(), 2, self.SAMPLING, seed=rollout))

            def once(place: int, _: Completion, rollout: int = rollout, seen: list[int] = seen) -> None:
                seen.append(place)
                if len(seen) == 2 * (1 + 2 * rollout):
                    os.killpg(group_of(engine, rollout % 2), signal.SIGKILL)

            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = tokens(engine.generate(self.prompts(), 2, self.SAMPLING, seed=rollout, on_completion=once))
                assert eventually(lambda c=caught: any("is started again" in str(w.message) for w in c))
            restarts += sum("is started again (1 of 3)" in str(w.message) for w in caught)
            assert sorted(seen) == list(range(24))
            assert found == expected
            assert engine.version == rollout
        assert restarts == 4

    def test_a_stuck_server_is_replaced(
        self, fakes: Callable[..., VLLMServerEngine], model: PreTrainedModel, tiny_model_path: Path
    ) -> None:
        engine = fakes(patience=replace(PATIENT, stall=1, restarts=20))
        engine.start(str(tiny_model_path))
        engine.load_weights(model.named_parameters(), 1)
        expected = tokens(engine.generate(self.prompts(), 1, self.SAMPLING))
        os.killpg(group_of(engine), signal.SIGSTOP)
        with pytest.warns(UserWarning, match=r"(?s)does not answer \(ReadTimeout.*serving.*started again"):
            assert tokens(engine.generate(self.prompts(), 1, self.SAMPLING)) == expected

    def test_lost_too_often_ends_the_run(
        self, fakes: Callable[..., VLLMServerEngine], model: PreTrainedModel, tiny_model_path: Path, tmp_path: Path
    ) -> None:
        engine = fakes(patience=replace(PATIENT, restarts=1))
        engine.start(str(tiny_model_path))
        engine.load_weights(model.named_parameters(), 1)
        (tmp_path / "broken").touch()
        os.killpg(group_of(engine), signal.SIGKILL)
        with (
            pytest.warns(UserWarning, match="started again"),
            pytest.raises(RolloutError, match=r"(?s)no memory for the model.*restarted 1 times .*resume the run"),
        ):
            engine.generate(self.prompts(), 1, self.SAMPLING)

    def test_a_server_that_cannot_start_is_a_matter_of_settings(
        self, fakes: Callable[..., VLLMServerEngine], tiny_model_path: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "broken").touch()
        with pytest.raises(ConfigError, match=r"(?s)exit code 1 while it was starting.*no memory for the model"):
            fakes().start(str(tiny_model_path))
        assert list((tmp_path / "folder").iterdir()) == []

    def test_stale_weights_are_never_sampled_from(
        self, fakes: Callable[..., VLLMServerEngine], model: PreTrainedModel, tiny_model_path: Path, tmp_path: Path
    ) -> None:
        engine = fakes()
        engine.start(str(tiny_model_path))
        (tmp_path / "stale").touch()
        engine.load_weights(model.named_parameters(), 1)
        engine.patience = Patience(start=0.1, stall=3)  # for the right weights, of a server that is up
        with pytest.raises(RolloutError, match=r"has the weights '\w+/0', not '\w+/1', and has not for 3\.1 s"):
            engine.generate(self.prompts(), 1, self.SAMPLING)

    def test_a_full_disk(
        self,
        fakes: Callable[..., VLLMServerEngine],
        model: PreTrainedModel,
        tiny_model_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        engine = fakes()
        engine.start(str(tiny_model_path))
        read: list[str] = []

        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            for name, parameter in model.named_parameters():
                read.append(name)
                yield name, parameter

        def full(*_: Any) -> None:
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(
                "cppo_lightning.engines.vllm_server.weight_transfer.write_weights", partial(write_weights, shard_bytes=1)
            )
            patch.setattr("cppo_lightning.engines.vllm_server.weight_folder.save_file", full)
            with pytest.raises(RolloutError, match=r"cannot be written .* No space left"):
                engine.load_weights(gathered(), 1)
        assert read == [name for name, _ in model.named_parameters()], "other ranks would wait for the rest"
        with pytest.raises(RolloutError, match="call load_weights first"):
            engine.generate(self.prompts(), 1, self.SAMPLING)
        assert engine.version == -1
        engine.load_weights(gathered(), 2)
        assert len(engine.generate(self.prompts(), 1, self.SAMPLING)) == 12

    def test_what_a_callback_raises_comes_out_and_the_engine_goes_on(
        self, fakes: Callable[..., VLLMServerEngine], tiny_model_path: Path
    ) -> None:
        def refuse(place: int, completion: Completion) -> None:
            raise RolloutError(f"not {place}")

        engine = fakes()
        engine.start(str(tiny_model_path))
        before = threading.active_count()
        with pytest.raises(RolloutError, match="not "):
            engine.generate(self.prompts(), 1, self.SAMPLING, on_completion=refuse)
        assert threading.active_count() == before
        assert len(engine.generate(self.prompts(), 1, self.SAMPLING)) == 12

    def test_no_orphans(
        self,
        fakes: Callable[..., VLLMServerEngine],
        model: PreTrainedModel,
        tiny_model_path: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        engine = fakes(servers=2, weights_folder="~/folder")
        engine.start(str(tiny_model_path))
        engine.load_weights(model.named_parameters(), 1)
        groups = [group_of(engine, 0), group_of(engine, 1)]
        assert not any(map(is_empty, groups))
        engine.close()
        engine.close()
        assert (engine.version, engine.checksums()) == (-1, None), "it has no weights any more"
        assert eventually(lambda: all(map(is_empty, groups)))
        assert list((tmp_path / "folder").iterdir()) == []


def test_a_server_ends_with_its_trainer_and_leaves_nothing(tmp_path: Path) -> None:
    """Even with SIGKILL, and with all that the server has started; of the run's folder nothing stays, of others all."""
    folder = tmp_path / "vllm-1"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "weights").touch()
    (tmp_path / "vllm-2").mkdir()
    supervisor = Path(vllm_process.__file__).with_name("supervisor.py")
    server = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '600'])"]
    code = (
        "import os, subprocess, sys, time\n"
        f"command = [sys.executable, '-P', {str(supervisor)!r}, str(os.getpid()), {str(folder)!r}, *{server!r}]\n"
        "print(subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL).pid, flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    group = int(trainer.stdout.readline())
    assert not eventually(lambda: is_empty(group), seconds=1)
    assert (folder / "1" / "weights").exists()
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert eventually(lambda: is_empty(group))
    assert [left.name for left in tmp_path.iterdir()] == ["vllm-2"]


class TestWhoListens:
    """The key of a server that this run started on loopback goes to nobody but a process of this user."""

    @pytest.fixture
    def got(self) -> list[str | None]:
        return []

    @pytest.fixture
    def url(self, got: list[str | None]) -> Iterator[str]:
        """Someone who writes the keys that come into ``got``."""

        class Taker(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                got.append(self.headers["Authorization"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        with ThreadingHTTPServer(("127.0.0.1", 0), Taker) as server:
            threading.Thread(target=server.serve_forever).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    def write(self, folder: Path, url: str, user: int, state: str = "0A") -> None:
        """A table like Linux's for ``url``, on a machine with this one's order of bytes."""
        place = f"{'0100007F' if sys.byteorder == 'little' else '7F000001'}:{int(url.rsplit(':')[-1]):04X}"
        (folder / "tcp").write_text(
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
            "   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0 100 0 0 10 0\n"
            f"   1: {place} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 {user:5d}      0 12 1 0 100 0 0 10 0\n"
        )

    def test_our_own_process_gets_the_key(self, url: str, got: list[str | None]) -> None:
        assert Server(url, "secret", PATIENT, ours=True).is_up()
        assert got == ["Bearer secret"]

    @pytest.mark.parametrize(("state", "user"), [("0A", os.geteuid() + 1), ("01", os.geteuid())])
    def test_nobody_else_does(
        self, url: str, got: list[str | None], state: str, user: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listener, "_TABLES", tmp_path)
        self.write(tmp_path, url, user, state)
        patience = Patience(start=0.1, stall=0.1)
        server = Server(url, "secret", patience, ours=True)
        assert not server.is_up()
        with pytest.raises(ServerAwayError, match="no process of this user listens there"):
            server.describe()
        with pytest.raises(RolloutError, match="no process of this user listens there"):
            list(sampled([{}], [server], "run/1", patience, lambda: None))
        assert got == []
        self.write(tmp_path, url, os.geteuid())
        assert Server(url, "secret", PATIENT, ours=True).is_up()
        assert got == ["Bearer secret"]

    def test_localhost_is_asked_by_its_number(self, tmp_path: Path) -> None:
        """By its name it might be asked over IPv6 first, where someone else may listen."""
        process = vllm_process.ServerProcess("localhost", {}, "key", tmp_path, "server.log")
        assert Fleet([process], "key", tmp_path, "run/0", PATIENT, ThroughFolder()).urls == [f"http://127.0.0.1:{process.port}"]
        process.close()

    def test_of_servers_elsewhere_nothing_is_known(
        self, url: str, got: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listener, "_TABLES", tmp_path)
        self.write(tmp_path, url, os.geteuid() + 1)
        assert Server(url, "secret", PATIENT).is_up()
        assert got == ["Bearer secret"]

    def test_without_proc_the_user_is_taken_to_be_right(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(listener, "_TABLES", tmp_path)
        assert listener.listens_as_us("127.0.0.1", 9)

    @pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the tables are Linux's")
    @pytest.mark.parametrize(("address", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
    def test_is_what_linux_says(self, address: str, family: int) -> None:
        with socket.socket(family) as ours:
            try:
                ours.bind((address, 0))
            except OSError:
                pytest.skip(f"this machine has no {address}")
            port = ours.getsockname()[1]
            assert not listener.listens_as_us(address, port), "bound is not yet listening"
            ours.listen()
            assert listener.listens_as_us(address, port)


class TestServersElsewhere:
    @pytest.fixture
    def url(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """A server that this process runs itself, with the key ``secret``."""
        monkeypatch.setenv(KEY, "secret")
        for name, value in (("key", "secret"), ("label", "someone's"), ("description", dict(fake_vllm_server.DESCRIPTION))):
            monkeypatch.setitem(fake_vllm_server.state, name, value)
        server = fake_vllm_server.Server(("127.0.0.1", 0), fake_vllm_server.Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        server.server_close()
        thread.join()

    def test_is_sampled_from_once_it_has_our_weights(
        self, fakes: Callable[..., VLLMServerEngine], url: str, model: PreTrainedModel, tiny_model_path: Path
    ) -> None:
        engine = fakes(urls=[url])
        engine.start(str(tiny_model_path))
        with pytest.raises(RolloutError, match="call load_weights first"):
            engine.generate(PROMPTS, 2, Sampling(max_tokens=8))
        engine.load_weights(model.named_parameters(), 1)
        assert len(engine.generate(PROMPTS, 2, Sampling(max_tokens=8))) == 8
        assert engine.checksums() == checksums(model.named_parameters(), torch.float32)
        with pytest.raises(ConfigError, match="n 65 should be at most 64"):
            engine.generate(PROMPTS, 65, Sampling(max_tokens=8))

    def test_that_is_open_to_all_is_refused(
        self, fakes: Callable[..., VLLMServerEngine], url: str, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(fake_vllm_server.state, "key", None)
        with pytest.raises(ConfigError, match=r"lets in who has no key; start it with: VLLM_API_KEY=.* --middleware"):
            fakes(urls=[url]).start(str(tiny_model_path))

    def test_that_has_another_key(
        self, fakes: Callable[..., VLLMServerEngine], url: str, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(fake_vllm_server.state, "key", "other")
        with pytest.raises(RolloutError, match=r"does not accept the API key; .*api_key_env"):
            fakes(urls=[url]).start(str(tiny_model_path))

    @pytest.mark.parametrize(
        ("name", "value"),
        [("dtype", "bfloat16"), ("logprobs_mode", "raw_logprobs"), ("max_logprobs", 19), ("takes_seeds", False)],
    )
    def test_that_runs_with_other_settings(
        self, fakes: Callable[..., VLLMServerEngine], url: str, tiny_model_path: Path, name: str, value: object
    ) -> None:
        fake_vllm_server.state["description"][name] = value
        with pytest.raises(ConfigError, match=rf"has {name} {value}, .* --logprobs-mode processed_logprobs"):
            fakes(urls=[url]).start(str(tiny_model_path))

    def test_that_runs_another_vllm(self, fakes: Callable[..., VLLMServerEngine], url: str, tiny_model_path: Path) -> None:
        fake_vllm_server.state["description"]["version"] = "0.33.0"
        with pytest.raises(ConfigError, match=rf"vLLM 0\.33\.0 is installed at {url}, .* tested with >=0\.32"):
            fakes(urls=[url]).start(str(tiny_model_path))

    def test_that_does_not_answer(self, fakes: Callable[..., VLLMServerEngine], url: str, tiny_model_path: Path) -> None:
        nobody = fakes(urls=["http://127.0.0.1:9"], patience=Patience(start=1))
        with pytest.raises(RolloutError, match=r"127\.0\.0\.1:9 does not answer .* for 1 s"):
            nobody.start(str(tiny_model_path))


def _rank(rank: int, folder: str, port: str, model: str) -> None:
    """One of two ranks that share a server; rank 0 has the disk."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, KEY: "secret"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    fake_vllm_server.stand_in()
    os.chdir(folder)
    engine = VLLMServerEngine(patience=PATIENT)
    engine.start(model)
    weights = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
    engine.load_weights(weights.items(), 3)
    one, both = PROMPTS[rank], torch.zeros(2, 8, dtype=torch.int64)
    both[rank] = engine.generate([one], 1, Sampling(max_tokens=8), seed=5)[0].ids
    torch.distributed.all_reduce(both)
    assert engine.version == 3
    assert (engine._fleet is None) == (rank == 1)
    assert torch.equal(both[0], both[1]), "one server, one seed, one place: the same draws on both ranks"
    assert engine.checksums() == checksums(weights.items(), torch.float32)
    if rank == 0:
        Path(engine._fleet._folder, f"{engine._run}-2").touch()  # type: ignore[union-attr]  # in the way of the next weights
        Path(engine._fleet._folder, f".{engine._run}-2.partial").touch()  # type: ignore[union-attr]
    with pytest.raises(
        RolloutError, match="rank 0: the weights cannot be written" if rank else "the weights cannot be written"
    ):
        engine.load_weights(weights.items(), 4)
    engine.close()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_servers_and_errors(tmp_path: Path, tiny_model_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(_rank, (str(tmp_path), port, str(tiny_model_path)), nprocs=2)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def engine(tiny_model_path: Path) -> Iterator[VLLMServerEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        engine = VLLMServerEngine(max_model_len=512)
        engine.start(str(tiny_model_path))
    yield engine
    engine.close()


class TestWithVLLM:
    pytestmark = needs_vllm

    def test_logp_and_topk_equal_a_full_forward_pass(self, engine: VLLMServerEngine, model: PreTrainedModel) -> None:
        places: list[int] = []
        sampling = Sampling(max_tokens=64, temperature=1.3)
        completions = engine.generate(PROMPTS, 4, sampling, 5, seed=1, on_completion=lambda i, _: places.append(i))
        assert sorted(places) == list(range(16))
        gaps, outside = [], 0
        for row, completion in enumerate(completions):
            completion.check("row")
            expected = oracle_logp(model, PROMPTS[row // 4], completion.ids, 1.3)
            gaps.append((completion.logp - expected.gather(-1, completion.ids[:, None])[:, 0]).abs())
            assert completion.topk_ids is not None
            outside += int((completion.topk_ids != completion.ids[:, None]).all(-1).sum())
        gap = torch.cat(gaps)
        assert len(gap) > 500
        assert gap.mean() < 1e-4
        assert gap.max() < 1e-3
        assert largest_difference(model, completions, PROMPTS, 4, 1.3) < 1e-3
        assert outside > 0, "no sampled token was outside the top-K, so that case was not tested"
        assert tokens(engine.generate(PROMPTS, 4, sampling, seed=1)) == tokens(completions)
        assert tokens(engine.generate(PROMPTS, 4, sampling, seed=2)) != tokens(completions)

    def test_greedy_equals_transformers_generate(self, engine: VLLMServerEngine, model: PreTrainedModel) -> None:
        completions = engine.generate(PROMPTS, 1, Sampling(max_tokens=16, temperature=0), top_logprobs=3)
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            expected = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)  # type: ignore[operator]
            assert completion.ids.tolist() == expected[0, len(prompt) :].tolist()
        assert largest_difference(model, completions, PROMPTS, 1, 1.0) < 1e-3

    def test_who_has_no_key_gets_nothing(self, engine: VLLMServerEngine) -> None:
        url, key = engine._servers[0].url, engine._servers[0].headers
        routes = (
            "/collective_rpc",
            "/cppo/generate",
            "/update_weight_version",
            "/reset_prefix_cache",
            "/v1/completions",
        )
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": key["Authorization"][:-1]}):
            assert [httpx.post(url + route, json={}, headers=headers, timeout=60).status_code for route in routes] == [401] * 5
            assert httpx.get(url + "/health", headers=headers, timeout=60).status_code == 401
        assert httpx.get(url + "/health", headers=key, timeout=60).status_code == 200
        command_lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
        assert not any(key["Authorization"].split()[1].encode() in line for line in command_lines)

    def test_new_weights_show_and_wrong_ones_are_refused(self, engine: VLLMServerEngine, model: PreTrainedModel) -> None:
        weights = scaled(model, 1.2)
        changed = AutoModelForCausalLM.from_config(model.config)
        changed.load_state_dict(weights)
        engine.load_weights(weights.items(), 7)
        assert engine.version == 7
        assert engine.checksums() == checksums(weights.items(), torch.float32)
        completions = engine.generate(PROMPTS, 2, Sampling(max_tokens=24), top_logprobs=20)
        assert largest_difference(changed.eval(), completions, PROMPTS, 2, 1.0) < 1e-3
        assert largest_difference(model, completions, PROMPTS, 2, 1.0) > 0.1
        with pytest.raises(RolloutError, match=r"missing 1: model\.norm\.weight"):
            engine.load_weights(((k, v) for k, v in weights.items() if k != "model.norm.weight"), 8)
        assert engine.version == -1
        with pytest.raises(RolloutError, match="call load_weights first"):
            engine.generate(PROMPTS, 1, Sampling(max_tokens=4))

    @pytest.mark.parametrize("left_out", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
    def test_a_parameter_left_out_on_the_way_is_refused_by_the_server(
        self, engine: VLLMServerEngine, model: PreTrainedModel, left_out: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that the trainer had, and that did not get into the folder; vLLM holds the second in one layer with q and v."""

        def sabotaged(weights: Any, folder: Path, label: str) -> None:
            write_weights(((name, 2 * tensor) for name, tensor in weights if name != left_out), folder, label)

        with monkeypatch.context() as patch:
            patch.setattr("cppo_lightning.engines.vllm_server.weight_transfer.write_weights", sabotaged)
            with pytest.raises(RolloutError, match=f"missing 1: {re.escape(left_out)}"):
                engine.load_weights(model.named_parameters(), 9)
        assert engine.version == -1
        engine.load_weights(model.named_parameters(), 9)
        completions = engine.generate(PROMPTS, 1, Sampling(max_tokens=8))
        assert largest_difference(model, completions, PROMPTS, 1, 1.0) < 1e-3

    def test_killed_while_it_samples(self, engine: VLLMServerEngine, model: PreTrainedModel) -> None:
        weights = scaled(model, 1.1)
        changed = AutoModelForCausalLM.from_config(model.config)
        changed.load_state_dict(weights)
        engine.load_weights(weights.items(), 10)
        prompts, sampling, places = PROMPTS * 4, Sampling(max_tokens=400), list[int]()
        calm = tokens(engine.generate(prompts, 4, sampling, seed=3))
        ends = sorted(max(map(len, calm[i : i + 4])) for i in range(0, 64, 4))
        assert ends[0] < ends[-1] / 2, "the first answer comes when others have far to go"

        def killed_at_the_first(place: int, completion: Completion) -> None:
            if not places:
                os.killpg(group_of(engine), signal.SIGKILL)
            places.append(place)

        with pytest.warns(UserWarning, match=r"is started again \(1 of 3\)"):
            found = engine.generate(prompts, 4, sampling, seed=3, on_completion=killed_at_the_first)
        assert sorted(places) == list(range(64))
        assert largest_difference(changed.eval(), found, prompts, 4, 1.0) < 1e-3
        same = sum(a == b for a, b in zip(tokens(found), calm, strict=True))
        assert same >= 48, "each prompt has its own random stream: little but rounding may differ"
