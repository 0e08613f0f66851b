"""The trainer's end of vLLM's weight-transfer API; needs vLLM."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from cppo_lightning.engines.vllm_server.client import Server, ServerAwayError, is_loopback, on_each
from cppo_lightning.engines.vllm_server.transfer_backends import GlooTrainerInitInfo
from cppo_lightning.errors import RolloutError

if TYPE_CHECKING:
    from torch import Tensor


def stream(
    weights: Iterable[tuple[str, Tensor]], servers: Sequence[Server], way: str, bucket_bytes: int, seconds: float
) -> list[dict[str, int]]:
    """Send ``weights`` to all servers at once; what each of them says that it received: a checksum by name.

    vLLM's trainer side wants to know every name and shape before it sends.  Here it is told those of a bucket at a time, which
    is one update to it, so that ``weights`` may be gathered as they go.

    Args:
        way: "gloo", "nccl" or "ipc".
        bucket_bytes: size of a bucket, at least that of the largest parameter.
        seconds: bounds the wait for one tensor, with gloo.

    Raises:
        ServerAwayError: a server was lost.
        RolloutError: a server refused, or the weights could not be sent.
    """
    workers = [server.workers() for server in servers]
    client, bucket = AllServers(servers, workers), Bucket("cpu" if way == "gloo" else "cuda")
    on_each(servers, lambda server: server.begin())
    with _explained(client, servers):
        info = _init_info(way, servers, 1 + sum(workers), bucket_bytes, seconds)
        engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=bucket)
    client.on_failure = engine.shutdown
    try:
        for _ in bucket.fillings(weights, bucket_bytes):
            with _explained(client, servers):
                engine.send_weights()  # type: ignore[call-arg]
        return on_each(servers, lambda server: server.finish())
    finally:
        engine.shutdown()


def _init_info(way: str, servers: Sequence[Server], size: int, bucket_bytes: int, seconds: float) -> TrainerInitInfo:
    if way == "ipc":  # packed, since what is not is read from memory that the next bucket overwrites
        return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=bucket_bytes)
    seen = [_address_for(server) for server in servers]
    # one on this machine reaches what one elsewhere does
    address, port = next((each for each in seen if not is_loopback(each)), seen[0]), _free_port()
    if way == "nccl":
        return NCCLTrainerInitInfo(address, port, size, packed=False, rank=0)
    return GlooTrainerInitInfo(address, port, size, seconds, rank=0)


class Bucket(WeightSource):
    """Some parameters, in copies on ``device``."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._tensors: list[tuple[str, Tensor]] = []

    def fillings(self, weights: Iterable[tuple[str, Tensor]], most: int) -> Iterator[None]:
        """Fill it with ``most`` bytes, or one larger parameter, again and again until none is left."""
        for name, tensor in weights:
            if self._tensors and self._bytes() + tensor.nbytes > most:
                yield
                self._tensors.clear()
            # a copy: the trainer may gather the next parameter into the same memory
            self._tensors.append((name, tensor.to(self._device, copy=True).contiguous()))
            del tensor
        if self._tensors:
            yield
        self._tensors.clear()

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._tensors)

    def _bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self._tensors)


class AllServers(HTTPVLLMWeightSyncClient):
    """The client of vLLM's trainer side, for several servers at once, with their keys.

    A start and an end come once for all buckets, from ``Server.begin`` and ``Server.finish``, and not from here.

    Args:
        servers: to whom it speaks.
        workers: how many processes each has.

    Attributes:
        failure: what the first call that failed raised.
        on_failure: called then, to free this process from a broadcast that nobody receives.
    """

    def __init__(self, servers: Sequence[Server], workers: Sequence[int]) -> None:
        self._servers, self._workers = servers, workers
        self._busy = Lock()
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        bodies = []
        for before in accumulate(self._workers[:-1], initial=0):
            first = {"rank_offset": init_info["rank_offset"] + before} if "rank_offset" in init_info else {}
            bodies.append({"init_info": init_info | first})
        self._post_each("/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    def settled(self) -> Exception | None:
        """What went wrong, once no call is under way."""
        with self._busy:
            return self.failure

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        self._post_each(f"/{path}", [json] * len(self._servers))

    def _post_each(self, path: str, bodies: Sequence[dict[str, Any] | None]) -> None:
        with self._busy:
            try:
                on_each(self._servers, lambda server, body: server.post(path, body), bodies)
            except Exception as error:
                self.failure = error
                self.on_failure()
                raise


@contextmanager
def _explained(client: AllServers, servers: Sequence[Server]) -> Iterator[None]:
    """Raise what is behind a failure to send: when one server goes away the others refuse, since their group has ended."""
    try:
        yield
    except Exception as error:
        client.on_failure()
        reason = client.settled() or error
        away = [server.url for server in servers if not server.is_up()]
        if away:
            raise ServerAwayError(f"{', '.join(away)} does not answer ({type(reason).__name__}: {reason})") from error
        raise RolloutError(f"the weights could not be sent to the servers: {reason}") from error


def _address_for(server: Server) -> str:
    """This machine's address as ``server`` sees it."""
    parts = urlsplit(server.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=10) as connection:
            return connection.getsockname()[0]
    except OSError as error:
        raise ServerAwayError(f"{server.url} does not answer ({error})") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
