"""Weights from the trainer's memory into servers': in buckets, through vLLM's own API, and what becomes of lost servers."""

from __future__ import annotations

import base64
import copy
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cppo_lightning.engines.checksums import checksums
from cppo_lightning.engines.engine import Sampling
from cppo_lightning.engines.vllm_server import weight_transfer
from cppo_lightning.engines.vllm_server.client import Patience, Server, ServerAwayError, on_each
from cppo_lightning.engines.vllm_server.engine import VLLMServerEngine
from cppo_lightning.engines.vllm_server.fleet import Fleet
from cppo_lightning.engines.vllm_server.keeper import Keeper
from cppo_lightning.engines.vllm_server.weight_folder import WeightFolder, copied
from cppo_lightning.engines.vllm_server.weight_transfer import ByVLLM, transfer_by
from cppo_lightning.errors import ConfigError, RolloutError

from .test_vllm_engine import largest_difference, needs_vllm
from .test_weight_sync import AtOnce

PROMPTS = [list(range(first, first + 40)) for first in (10, 60, 100, 150)]
KEY = "CPPO_VLLM_API_KEY"
WEIGHTS = {f"p{i}": torch.randn(64, i + 1, generator=torch.Generator().manual_seed(i)) for i in range(8)}
ONCE = Patience(start=20, stall=5, request=20, restarts=0)
AGAIN = Patience(start=20, stall=5, request=20, restarts=1)


class TestSettings:
    @pytest.fixture(autouse=True)
    def elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(KEY, "secret")
        monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
        monkeypatch.setattr(weight_transfer, "check_installed", lambda engine: None)

    @pytest.mark.parametrize(
        ("settings", "cuda", "message"),
        [
            ({"weight_transfer": "rdma"}, True, r"engine\.weight_transfer must be one of folder, gloo, nccl, ipc, got 'rdma'"),
            ({"weight_transfer": "ipc"}, False, r"ipc needs CUDA"),
            ({"weight_transfer": "nccl", "urls": ["http://a:1"], "weights_folder": "w"}, False, r"nccl needs CUDA"),
            ({"weight_transfer": "ipc", "urls": ["http://a:1"], "weights_folder": "w"}, True, r"engine\.urls.*take nccl"),
            ({"weight_transfer": "nccl"}, True, r"share the trainer's GPU; take ipc"),
            (
                {"weight_transfer": "ipc", "engine_args": {"tensor_parallel_size": 2}},
                True,
                r"tensor_parallel_size must be 1, got 2",
            ),
            ({"weight_transfer": "ipc"}, True, r"set VLLM_ALLOW_INSECURE_SERIALIZATION=1"),
            ({"weight_transfer": "gloo", "urls": ["http://a:1"]}, False, r"weights_folder.*restarts 0"),
            ({"engine_args": {"weight_transfer_config": {}}}, False, r"use engine\.weight_transfer"),
        ],
    )
    def test_that_cannot_work(
        self, settings: dict[str, Any], cuda: bool, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        if settings.get("urls") is None:
            monkeypatch.setattr("cppo_lightning.engines.vllm_server.engine.check_installed", lambda engine: None)
        with pytest.raises(ConfigError, match=message):
            VLLMServerEngine(**settings)

    def test_that_can(self, monkeypatch: pytest.MonkeyPatch) -> None:
        VLLMServerEngine(urls=["http://a:1"], weight_transfer="gloo", patience=ONCE)  # no folder is written, none is needed
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        VLLMServerEngine(urls=["http://a:1"], weight_transfer="nccl", patience=ONCE)

    def test_ipc_is_for_one_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        transfer_by("gloo", torch.float32, WEIGHTS.values(), ONCE)
        with pytest.raises(ConfigError, match="ipc is for one rank"):
            transfer_by("ipc", torch.float32, WEIGHTS.values(), ONCE)

    def test_a_server_that_was_started_for_another(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Server, "is_open", lambda server: False)
        monkeypatch.setattr(Server, "describe", lambda server: {"version": "0.32.0", "weight_transfer": None})
        gloo = ByVLLM("gloo", torch.float32, 100, ONCE)
        fleet = Fleet(["http://a:1"], "key", tmp_path, "run/0", ONCE, gloo)
        with pytest.raises(ConfigError, match=r"""http://a:1 .*--weight-transfer-config '{"backend": "cppo_gloo"}'$"""):
            fleet.limits("model", "float32", 5, None)


class TestCopied:
    def test_passes_on_what_it_writes(self, tmp_path: Path) -> None:
        passed = copied(WEIGHTS.items(), tmp_path / "w", "run/1", shard_bytes=2000)
        first = next(passed)
        assert not (tmp_path / "w").exists()
        assert [first, *passed] == list(WEIGHTS.items())
        back = dict(WeightFolder(tmp_path / "w", "run/1").tensors())
        assert all(torch.equal(back[name], tensor) for name, tensor in WEIGHTS.items())

    def test_what_is_given_up_leaves_nothing(self, tmp_path: Path) -> None:
        passed = copied(WEIGHTS.items(), tmp_path / "w", "run/1", shard_bytes=1)
        next(passed)
        assert list(tmp_path.iterdir())
        del passed
        assert not list(tmp_path.iterdir())

    def test_a_disk_that_takes_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RolloutError, match=r"cannot be written into .*engine\.weights_folder"):
            next(copied(WEIGHTS.items(), tmp_path / "file" / "w", "run/1"))


class Watched:
    """A keeper of no server, which notes what is wanted of it."""

    def __init__(self) -> None:
        self.server = cast("Server", SimpleNamespace(use=lambda label: self.wanted.append(label)))
        self.at_work = threading.Lock()
        self.wanted: list[Any] = []

    def want(self, folder: Path, label: str, received: dict[str, int] | None = None) -> None:
        assert self.at_work.locked(), "the server's own keeper would see its weights change meanwhile"
        self.wanted.append((folder, label, received))


class Streams:
    """In place of the real sending: reads ``until`` parameters, then raises; answers with ``answer`` or what it read."""

    def __init__(self, until: int | None = None, answer: dict[str, int] | None = None) -> None:
        self.until, self.answer = until, answer

    def __call__(self, weights: Iterable[tuple[str, Tensor]], servers: list[Server], *_: Any) -> list[dict[str, int]]:
        found = {}
        for number, (name, tensor) in enumerate(weights):
            if number == self.until:
                raise ServerAwayError("http://a:1 does not answer")
            found |= checksums([(name, tensor)], torch.bfloat16)
            assert tensor.dtype == torch.bfloat16
        return [found] * (len(servers) - 1) + [found if self.answer is None else self.answer]


class TestByVLLM:
    pytestmark = pytest.mark.vllm  # for the module that is replaced

    def send(
        self, streams: Streams, patience: Patience, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[list[Watched], Exception | None]:
        monkeypatch.setattr("cppo_lightning.engines.vllm_server.transfer_trainer.stream", streams)
        keepers = [Watched(), Watched()]
        try:
            ByVLLM("gloo", torch.bfloat16, 100, patience).send(WEIGHTS.items(), cast("list[Keeper]", keepers), folder, "run/1")
        except RolloutError as error:
            return keepers, error
        finally:
            assert not any(keeper.at_work.locked() for keeper in keepers)
        return keepers, None

    @pytest.mark.parametrize("patience", [ONCE, AGAIN])
    def test_servers_that_took_them_are_used(self, patience: Patience, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keepers, error = self.send(Streams(), patience, tmp_path / "w", monkeypatch)
        assert error is None
        for keeper in keepers:
            assert keeper.wanted == ["run/1", (tmp_path / "w", "run/1", checksums(WEIGHTS.items(), torch.bfloat16))]
        assert (tmp_path / "w").exists() == bool(patience.restarts)
        if patience.restarts:
            assert checksums(WeightFolder(tmp_path / "w", "run/1").tensors(), torch.bfloat16) == keepers[0].wanted[1][2]

    @pytest.mark.parametrize("until", [0, 3, 7])
    def test_a_server_lost_midway_and_all_others_read_the_folder(
        self, until: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keepers, error = self.send(Streams(until), AGAIN, tmp_path / "w", monkeypatch)
        assert error is None
        assert [keeper.wanted for keeper in keepers] == [[(tmp_path / "w", "run/1", None)]] * 2
        assert [name for name, _ in WeightFolder(tmp_path / "w", "run/1").tensors()] == list(WEIGHTS)

    def test_a_server_lost_midway_without_a_folder_ends_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keepers, error = self.send(Streams(3), ONCE, tmp_path / "w", monkeypatch)
        assert "resume the run from its last checkpoint" in str(error)
        assert [keeper.wanted for keeper in keepers] == [[], []]

    def test_other_weights_than_were_sent_are_named_and_not_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = checksums(WEIGHTS.items(), torch.bfloat16) | {"p3": 1, "more": 2}
        keepers, error = self.send(Streams(answer=wrong), AGAIN, tmp_path / "w", monkeypatch)
        assert str(error).endswith("more, p3")
        assert [keeper.wanted for keeper in keepers] == [[], []]


def test_a_server_that_lost_weights_without_a_copy_is_not_used_with_others(tmp_path: Path) -> None:
    class Forgetful:
        url = "http://a:1"

        def __init__(self) -> None:
            self.names: list[str] = []

        def label(self) -> str:
            return "run/0"  # as after a start

        def load(self, folder: Path | None, label: str) -> dict[str, int]:
            self.names.append(label)
            return {}

    server = Forgetful()
    keeper = Keeper(cast("Server", server), None, "run/0", ONCE)
    keeper.want(tmp_path / "w", "run/1", {"p": 1})
    assert keeper.wait(0) == {"p": 1}
    keeper.start()
    try:
        deadline = time.monotonic() + 60
        while keeper._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(RolloutError, match=r"http://a:1 lost the weights 'run/1', of which there is no copy"):
            keeper.check()
    finally:
        keeper.close()
    assert not server.names


class TestTrainersEnd:
    pytestmark = pytest.mark.vllm

    @pytest.mark.parametrize(
        ("most", "sizes"), [(1, [1] * 8), (1000, [2, 1, 1, 1, 1, 1, 1]), (10**6, [8])]
    )  # p0 has 256 bytes, p1 512, ...
    def test_buckets_hold_every_parameter_once_and_no_more_than_they_should(self, most: int, sizes: list[int]) -> None:
        from cppo_lightning.engines.vllm_server.transfer_trainer import Bucket

        buffer = torch.empty(64, 8)

        def gathered() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in WEIGHTS.items():  # into the same memory, as a trainer may
                yield name, buffer[:, : tensor.shape[1]].copy_(tensor)

        bucket, found = Bucket("cpu"), []
        for _ in bucket.fillings(gathered(), most):
            assert [meta.name for meta in bucket.metadata()] == [name for name, _ in bucket]
            assert all(tensor.is_contiguous() for _, tensor in bucket)
            found.append({name: tensor.clone() for name, tensor in bucket})
        assert [len(each) for each in found] == sizes
        whole = {name: tensor for each in found for name, tensor in each.items()}
        assert list(whole) == list(WEIGHTS)
        assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in whole.items())
        assert not bucket.metadata()

    def test_one_bucket_is_in_memory_besides_the_parameter_in_hand(self) -> None:
        from cppo_lightning.engines.vllm_server.transfer_trainer import Bucket

        counted = AtOnce(most=1)
        bucket, held = Bucket("cpu"), AtOnce(most=2)
        for _ in bucket.fillings(((f"p{i}", counted.add(torch.empty(1000))) for i in range(9)), 8000):
            for _, tensor in bucket:
                held.add(tensor)
        assert counted.count == held.count == 9

    def test_every_server_gets_ranks_of_its_own(self) -> None:
        from cppo_lightning.engines.vllm_server.transfer_trainer import AllServers

        posted: dict[str, Any] = {}

        def server(name: str) -> Server:
            return cast("Server", SimpleNamespace(post=lambda path, body: posted.__setitem__(name, (path, body))))

        client = AllServers([server("a"), server("b"), server("c")], [1, 4, 2])
        client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
        assert {name: body["init_info"] for name, (_, body) in posted.items()} == {
            name: {"rank_offset": first, "world_size": 8} for name, first in (("a", 1), ("b", 2), ("c", 6))
        }
        client.init_weight_transfer_engine({"packed": True})  # ipc has no ranks
        assert {str(body) for _, body in posted.values()} == {"{'init_info': {'packed': True}}"}

    @pytest.mark.parametrize(("up", "error"), [(True, RolloutError), (False, ServerAwayError)])
    def test_one_that_went_away_explains_why_others_refuse(self, up: bool, error: type[Exception]) -> None:
        from cppo_lightning.engines.vllm_server.transfer_trainer import AllServers, _explained

        def refuse(path: str, body: Any) -> None:
            raise RolloutError("connection closed by peer")

        well = cast("Server", SimpleNamespace(url="http://a:1", is_up=lambda: True, post=refuse))
        other = cast("Server", SimpleNamespace(url="http://b:1", is_up=lambda: up, post=lambda path, body: None))
        client = AllServers([well, other], [1, 1])
        with pytest.raises(error, match="connection closed by peer"), _explained(client, [well, other]):
            client.update_weights({})

    def test_a_call_that_fails_frees_the_sender(self) -> None:
        from cppo_lightning.engines.vllm_server.transfer_trainer import AllServers

        def refuse(path: str, body: Any) -> None:
            raise RolloutError(f"{path} refused")

        client, freed = AllServers([cast("Server", SimpleNamespace(post=refuse))], [1]), []
        client.on_failure = lambda: freed.append(True)
        with pytest.raises(RolloutError):
            client.update_weights({})
        assert freed == [True]
        assert str(client.settled()) == "/update_weights refused"

    def test_gloo_brings_what_rank_0_sends_and_ends_when_one_leaves(self) -> None:
        from cppo_lightning.engines.vllm_server.transfer_backends import GlooGroup

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        left = threading.Event()
        sent = [torch.randn(300, 7), torch.arange(5).bfloat16(), torch.tensor(3.0)]

        def rank(number: int) -> list[Tensor]:
            group = GlooGroup("127.0.0.1", port, number, 3, 60)
            tensors = [tensor.clone() if number == 0 else torch.empty_like(tensor) for tensor in sent]
            for tensor in tensors:
                group.broadcast(tensor)
            if number == 0:
                with pytest.raises(ConnectionRefusedError):  # another of this machine's addresses
                    socket.create_connection(("127.0.0.2", port), timeout=10)
                left.wait(60)
                with pytest.raises(RuntimeError, match=r"Connection (closed|reset) by peer|Broken pipe"):
                    group.broadcast(torch.zeros(5_000_000))  # more than sockets buffer
            group.destroy()
            left.set()
            return tensors

        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(rank, range(3)):
                assert all(torch.equal(one, other) for one, other in zip(found, sent, strict=True))


class Recorded:
    """Servers that say yes to everything, and what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.url = "http://127.0.0.1:1"

    def workers(self) -> int:
        return 2

    def post(self, path: str, body: Any) -> None:
        self.asked.append((path, body))

    def begin(self) -> None:
        self.asked.append(("begin", None))

    def finish(self) -> dict[str, int]:
        self.asked.append(("finish", None))
        return {"p": 1}

    def is_up(self) -> bool:
        return True


class TestCUDABackends:
    """vLLM's own trainer engines for nccl and ipc, with all but their two CUDA calls: what servers are told, in which order."""

    pytestmark = pytest.mark.vllm

    @pytest.fixture
    def servers(self, monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
        from cppo_lightning.engines.vllm_server import transfer_trainer

        bucket = transfer_trainer.Bucket
        monkeypatch.setattr(transfer_trainer, "Bucket", lambda device: {"cuda": bucket("cpu")}[device])
        monkeypatch.setattr(transfer_trainer, "_address_for", lambda server: "10.0.0.1")
        return [Recorded(), Recorded()]

    def test_nccl(self, servers: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.distributed.weight_transfer import nccl_engine

        from cppo_lightning.engines.vllm_server.transfer_trainer import stream

        sent: list[Tensor] = []
        left: list[bool] = []
        group = SimpleNamespace(
            broadcast=lambda tensor, src, stream: sent.append(tensor.clone()), destroy=lambda: left.append(True)
        )
        monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: group)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        found = stream(WEIGHTS.items(), cast("list[Server]", servers), "nccl", 1000, 5)
        assert found == [{"p": 1}] * 2
        assert all(torch.equal(one, other) for one, other in zip(sent, WEIGHTS.values(), strict=True))
        assert left
        for number, server in enumerate(servers):
            (_, init), *updates = [(path, body) for path, body in server.asked if path.startswith("/")]
            told = init["init_info"]
            assert (told["master_address"], told["rank_offset"], told["world_size"]) == ("10.0.0.1", 1 + 2 * number, 5)
            assert told["packed"] is False
            infos = [body["update_info"] for path, body in updates if path == "/update_weights"]
            assert [info["names"] for info in infos] == [["p0", "p1"], *([f"p{i}"] for i in range(2, 8))]
            assert infos[0]["shapes"] == [[64, 1], [64, 2]]
            assert infos[0]["dtype_names"] == ["float32", "float32"]
            # one start and one end, however many buckets
            assert [path for path, _ in server.asked if path != "/update_weights"] == [
                *("begin", "/init_weight_transfer_engine", "finish")
            ]

    @pytest.mark.parametrize(
        ("seen", "address"),
        [
            (["127.0.0.1", "::1", "10.0.0.2", "10.0.0.3"], "10.0.0.2"),
            (["127.0.0.1", "127.0.0.1"], "127.0.0.1"),
        ],
    )
    def test_all_servers_get_an_address_that_all_reach(
        self, seen: list[str], address: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server of this machine sees it as loopback, which for one elsewhere would be that one itself."""
        from cppo_lightning.engines.vllm_server import transfer_trainer

        monkeypatch.setattr(transfer_trainer, "_address_for", lambda server: server)
        for way in ("gloo", "nccl"):
            info = cast("Any", transfer_trainer._init_info(way, cast("Any", seen), 5, 1000, 5))
            assert info.master_address == address

    def test_ipc(self, servers: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.distributed.weight_transfer import ipc_engine
        from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk

        from cppo_lightning.engines.vllm_server.transfer_trainer import stream

        def produce(iterator: Iterator[tuple[str, Tensor]], buffer_size_bytes: int, **_: Any) -> Iterator[PackedIpcChunk]:
            tensors = dict(iterator)
            assert sum(tensor.nbytes for tensor in tensors.values()) <= buffer_size_bytes
            sizes = [tensor.nbytes for tensor in tensors.values()]
            shapes = [list(tensor.shape) for tensor in tensors.values()]
            yield PackedIpcChunk(list(tensors), shapes, ["float32"] * len(tensors), sizes, {"gpu": ("handle", 3)})

        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="gpu"))
        monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
        monkeypatch.setattr(ipc_engine, "packed_ipc_producer", produce)
        stream(WEIGHTS.items(), cast("list[Server]", servers), "ipc", 2048, 5)
        for server in servers:
            assert server.asked[:2] == [("begin", None), ("/init_weight_transfer_engine", {"init_info": {"packed": True}})]
            assert server.asked[-1] == ("finish", None)
            infos = [body["update_info"] for path, body in server.asked[2:-1]]
            assert [name for info in infos for name in info["names"]] == list(WEIGHTS)
            for info in infos:
                assert pickle.loads(base64.b64decode(info["ipc_handles_pickled"])) == {"gpu": ("handle", 3)}


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()


def scaled(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(factor)
    return other


def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


@pytest.fixture(scope="module")
def engine(tiny_model_path: Path) -> Iterator[VLLMServerEngine]:
    """Two servers with gloo, buckets smaller than a layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_transfer, "BUCKET_BYTES", 40_000)
        made = VLLMServerEngine(servers=2, weight_transfer="gloo", patience=Patience(start=600, stall=120, restarts=1))
        try:
            made.start(str(tiny_model_path))
            yield made
        finally:
            made.close()


def assert_samples_come_from(engine: VLLMServerEngine, model: PreTrainedModel) -> None:
    completions = engine.generate(PROMPTS, 2, Sampling(max_tokens=16), top_logprobs=5, seed=1)
    assert largest_difference(model, completions, PROMPTS, 2, 1.0) < 1e-3


class TestRealServers:
    pytestmark = needs_vllm

    def test_they_sample_with_what_was_sent(self, engine: VLLMServerEngine, model: PreTrainedModel) -> None:
        for version, factor in enumerate((1.3, 0.8, 1.0)):
            new = scaled(model, factor)
            engine.load_weights(weights_of(new), version)
            assert engine.version == version
            assert engine.checksums() == checksums(weights_of(new), torch.float32)
            assert_samples_come_from(engine, new)
        assert_samples_differ(engine, scaled(model, 1.3))

    def test_a_load_that_broke_off_is_not_sampled_from_and_does_not_mix_with_the_next(
        self, engine: VLLMServerEngine, model: PreTrainedModel
    ) -> None:
        def half() -> Iterator[tuple[str, Tensor]]:
            for number, named in enumerate(weights_of(scaled(model, 5.0))):
                if number == 13:
                    raise RolloutError("the trainer broke off")
                yield named

        for _ in range(2):
            with pytest.raises(RolloutError, match="the trainer broke off"):
                engine.load_weights(half(), 5)
            with pytest.raises(RolloutError, match="call load_weights first"):
                engine.generate(PROMPTS, 1, Sampling(max_tokens=1))
        new = scaled(model, 1.1)
        engine.load_weights(weights_of(new), 6)
        assert_samples_come_from(engine, new)

    def test_a_server_killed_while_weights_come_in_and_the_other_get_them_from_the_folder(
        self, engine: VLLMServerEngine, model: PreTrainedModel
    ) -> None:
        new = scaled(model, 0.9)

        def and_a_kill() -> Iterator[tuple[str, Tensor]]:
            for number, named in enumerate(weights_of(new)):
                if number == 13:
                    kill(engine, 1)
                yield named

        with pytest.warns(UserWarning, match="It is started again"):
            engine.load_weights(and_a_kill(), 7)
        assert engine.checksums() == checksums(weights_of(new), torch.float32)
        assert_samples_come_from(engine, new)
        new = scaled(model, 1.2)  # the one that was started again is in the next group
        engine.load_weights(weights_of(new), 8)
        assert_samples_come_from(engine, new)


def assert_samples_differ(engine: VLLMServerEngine, model: PreTrainedModel) -> None:
    with pytest.raises(AssertionError):
        assert_samples_come_from(engine, model)


def kill(engine: VLLMServerEngine, number: int) -> None:
    assert engine._fleet is not None
    process = engine._fleet._keepers[number]._process
    assert process is not None
    assert process._process is not None
    os.killpg(process._process.pid, signal.SIGKILL)


def test_on_each_waits_for_all_before_it_raises() -> None:
    done: list[str] = []

    def call(server: str) -> None:
        if server == "a":
            raise RolloutError("a refuses")
        time.sleep(0.2)
        done.append(server)

    with pytest.raises(RolloutError, match="a refuses"):
        on_each(cast("list[Any]", ["a", "b"]), cast("Any", call))
    assert done == ["b"]
