"""Prompts spread over vLLM servers: each answered once, by a server with the right weights, whatever happens to the others."""

from __future__ import annotations

import asyncio
import queue
import threading
import warnings
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import suppress
from typing import Any

import httpx

from cppo_lightning.engines.vllm_server.answers import PATH, Answer
from cppo_lightning.engines.vllm_server.client import Patience, Server, ServerAwayError, accepted
from cppo_lightning.errors import RolloutError

_MOST_IN_FLIGHT = 256  # requests per server; what it cannot run yet waits there
_ATTEMPTS = 3  # of one prompt, at servers that are well before and after it
_LONGEST_PAUSE = 5.0  # seconds between two looks at a server that is away
_LISTEN_SECONDS = 0.5

Body = dict[str, Any]


def sampled(
    bodies: Sequence[Body], servers: Sequence[Server], label: str, patience: Patience, check: Callable[[], None]
) -> Generator[tuple[int, Answer], None, None]:
    """Number and answer of each request, in the order in which they are answered.

    Closing the iterator calls off what is under way.

    Args:
        bodies: the requests, one for each prompt.
        servers: where they may be answered.
        label: the weights that a server must have to be sampled from.
        patience: time-outs.
        check: raises when a server will not come back.

    Raises:
        RolloutError: a server refused a request or stays away, or a request failed too often.
    """
    return _in_background(lambda deliver: _Rollout(bodies, servers, label, patience, check, deliver).run())


class _Rollout:
    """One call of ``sampled``, inside its event loop."""

    def __init__(
        self,
        bodies: Sequence[Body],
        servers: Sequence[Server],
        label: str,
        patience: Patience,
        check: Callable[[], None],
        deliver: Callable[[tuple[int, Answer]], None],
    ) -> None:
        self._bodies, self._servers, self._label, self._patience = bodies, servers, label, patience
        self._check, self._deliver = check, deliver
        self._left = len(bodies)
        self._done = asyncio.Event()
        self._waiting: asyncio.Queue[int] = asyncio.Queue()
        for number in range(len(bodies)):
            self._waiting.put_nowait(number)

    async def run(self) -> None:
        if not self._bodies:
            return
        timeout = httpx.Timeout(self._patience.request, connect=10.0)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        http = httpx.AsyncClient(trust_env=False, timeout=timeout, limits=limits)
        async with http as self._http, asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._use(server)) for server in self._servers]
            await self._done.wait()
            for task in tasks:
                task.cancel()

    async def _use(self, server: Server) -> None:
        """Have ``server`` answer prompts; when it is lost, they are free for others, and it is waited for."""
        at_once = min(_MOST_IN_FLIGHT, -(-len(self._bodies) // len(self._servers)))
        while True:
            await self._back(server)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._watch(server))
                    for _ in range(at_once):
                        group.create_task(self._answer(server))
            except* ServerAwayError as lost:
                warnings.warn(f"{_leaf(lost)}; the prompts it has not answered are sampled again", stacklevel=1)

    async def _back(self, server: Server) -> None:
        """Wait until ``server`` is there with the right weights."""
        clock, pause = asyncio.get_running_loop().time, 0.25
        limit = self._patience.start + self._patience.stall
        deadline = clock() + limit
        while True:
            self._check()
            try:
                return await self._probe(server)
            except ServerAwayError as error:
                if clock() > deadline:
                    advice = "start it again, then resume the run from its last checkpoint"
                    raise RolloutError(f"{error}, and has not for {limit:g} s (engine.patience); {advice}") from error
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _watch(self, server: Server) -> None:
        """Raise once ``server`` gives no sign of life: an engine that is stuck keeps its connections open."""
        while True:
            await asyncio.sleep(_LONGEST_PAUSE)
            await self._probe(server)

    async def _probe(self, server: Server) -> None:
        try:
            response = await self._http.get(server.url + "/weight_info", headers=server.headers, timeout=self._patience.stall)
        except httpx.TransportError as error:
            raise ServerAwayError(f"{server.url} does not answer ({type(error).__name__}: {error})") from error
        label = accepted(response, server.url, is_up=lambda: False).json()["weight_version"]
        if label != self._label:
            raise ServerAwayError(f"{server.url} has the weights {label!r}, not {self._label!r}")

    async def _answer(self, server: Server) -> None:
        while True:
            number = await self._waiting.get()
            try:
                answer = await self._ask(server, self._bodies[number])
            except BaseException:
                self._waiting.put_nowait(number)
                raise
            self._deliver((number, answer))
            self._left -= 1
            if not self._left:
                self._done.set()

    async def _ask(self, server: Server, body: Body) -> Answer:
        """The samples of one prompt, all of them drawn with the right weights."""
        reason = ""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                response = await self._http.post(server.url + PATH, json=body, headers=server.headers)
                if response.status_code < 500:
                    answer = Answer.from_bytes(accepted(response, server.url, is_up=lambda: False).content, server.url)
                    if answer.labels.tolist() == [self._label]:
                        return answer
                    reason = f"samples drawn with the weights {answer.labels.tolist()}"
                else:
                    reason = f"{response.status_code}: {response.text[:500]}"
            except httpx.ReadTimeout as error:
                limit = f"{self._patience.request:g} s (engine.patience.request)"
                raise RolloutError(f"{server.url} is well, but took more than {limit} for one prompt") from error
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            await asyncio.sleep(0.25 * 2**attempt)
            await self._probe(server)
        raise RolloutError(f"{server.url} failed {_ATTEMPTS} times to answer a prompt, the last time with {reason}")


def _in_background(produce: Callable[[Callable[[Any], None]], Coroutine[Any, Any, None]]) -> Generator[Any, None, None]:
    """What a coroutine delivers, which runs in a thread and event loop of its own; closing the iterator cancels it."""
    items: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    started: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = queue.SimpleQueue()

    async def run() -> None:
        task = asyncio.ensure_future(produce(lambda item: items.put((True, item))))
        started.put((asyncio.get_running_loop(), task))
        await asyncio.wait([task])
        items.put((False, None if task.cancelled() else task.exception()))

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    loop, task = started.get()
    try:
        while (item := _next(items))[0]:
            yield item[1]
        if item[1] is not None:
            raise _leaf(item[1])
    finally:
        with suppress(RuntimeError):  # the loop is closed: it has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        thread.join()


def _next(items: queue.SimpleQueue[tuple[bool, Any]]) -> tuple[bool, Any]:
    """The next item; an exception raised in this thread by another one, which ends a rollout ahead, is heard meanwhile."""
    while True:
        with suppress(queue.Empty):
            return items.get(timeout=_LISTEN_SECONDS)


def _leaf(error: BaseException) -> BaseException:
    """The first error in groups of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
