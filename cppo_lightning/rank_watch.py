"""Ranks that notice each other's end: one that dies alone would leave the others in a collective, or drawing a rollout, for as
long as that takes."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
import traceback
import warnings
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import torch

from cppo_lightning.interrupts import INTERRUPTS, pass_on

# From a rank's end to that of the others: their collectives mostly fail before that, and they close what they have open.
_GRACE_SECONDS = 10.0
# From a rank's error to its end: what it tears down may wait for the others.
_FAILING_SECONDS = 30.0
_POLL_SECONDS = 0.5
_MESSAGE_BYTES = 4096


class RankWatch:
    """Ends this process soon after any other rank's has ended before the run has, however it did, and says which.

    Every rank keeps a connection to rank 0, which tells the others what it hears.  The system closes it when the process ends,
    by SIGKILL too, and keepalive when its machine is gone; a rank that is merely busy is never taken for a dead one.  Signals
    travel along it, so that what one rank receives all receive.

    To make one is a collective.  Nobody without a secret that the process group shares is listened to.
    """

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self._peers = self._accepted() if self.rank == 0 else self._connected()
        for peer in self._peers:
            _keep_alive(peer)
            os.register_at_fork(after_in_child=peer.close)  # a child's copy would hide this process's end
        self._reasons: dict[int, str] = {}
        self._alone = False  # this rank ends, whatever the others do
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)
        self._thread.start()

    def failing(self, error: BaseException) -> None:
        """Say that this rank alone has failed, and end it, with its traceback, if it hangs in what it tears down."""
        self._alone = True
        self._tell(failing=f"{type(error).__name__}: {error}"[: _MESSAGE_BYTES // 8])

        def end() -> None:
            traceback.print_exception(error)
            os._exit(1)

        timer = threading.Timer(_FAILING_SECONDS, end)
        timer.daemon = True  # a process that ends by itself does not wait for it
        timer.start()

    def close(self) -> None:
        """Say that this rank's part in the run is over.  Safe to call twice."""
        if not self._closed.is_set():
            self._closed.set()
            self._tell(bye=True)
            self._thread.join()
            for peer in self._peers:
                peer.close()

    def _accepted(self) -> dict[Connection, int]:
        """Rank 0's connections to the others."""
        hosts = _gathered(socket.gethostname())
        host, key = "127.0.0.1" if len(set(hosts)) == 1 else "", secrets.token_hex(32)
        with Listener((host, 0), backlog=len(hosts)) as listener:
            port = listener.address[1]
            torch.distributed.broadcast_object_list([(host or os.environ.get("MASTER_ADDR", hosts[0]), port, key)])
            missing, peers = sum(_gathered(0)), dict[Connection, int]()
            while len(peers) < missing:
                peer = listener.accept()
                greeting = _read(peer) if peer.poll(_GRACE_SECONDS) else None
                if greeting is not None and secrets.compare_digest(str(greeting.get("key")), key):
                    peers[peer] = int(greeting["rank"])
                else:
                    peer.close()
        return peers

    def _connected(self) -> dict[Connection, int]:
        """Another rank's connection to rank 0."""
        _gathered(socket.gethostname())
        box: list[Any] = [None]
        torch.distributed.broadcast_object_list(box)
        host, port, key = box[0]
        try:
            peers = {Client((host, port)): 0}
        except OSError as error:
            warnings.warn(
                f"rank {self.rank} cannot reach rank 0 at {host}:{port} ({error}): if a rank dies, this one waits for it until "
                "its collectives time out",
                stacklevel=4,
            )
            peers = {}
        for peer in peers:
            _write(peer, rank=self.rank, key=key)
        _gathered(len(peers))
        return peers

    def _watch(self) -> None:
        told = INTERRUPTS.received
        while not self._closed.is_set():
            if told is None and INTERRUPTS.received is not None:
                told = INTERRUPTS.received
                self._tell(signal=int(told))
            for peer in wait(list(self._peers), _POLL_SECONDS):
                assert isinstance(peer, Connection), "there is nothing else in it"
                heard = _read(peer)
                self._hear(peer, {"rank": self._peers[peer], "gone": True} if heard is None else heard)

    def _hear(self, sender: Connection, message: dict[str, Any]) -> None:
        rank = message["rank"]
        if "gone" in message or "bye" in message:
            self._peers.pop(sender)
        if "failing" in message:
            self._reasons[rank] = message["failing"]
        if "bye" not in message:
            self._tell(sender, **message)
        if "signal" in message:
            pass_on(signal.Signals(message["signal"]))
        if "gone" in message:
            self._end(rank)

    def _tell(self, besides: Connection | None = None, **message: Any) -> None:
        for peer in list(self._peers):
            if peer is not besides:
                _write(peer, **{"rank": self.rank, **message})

    def _end(self, rank: int) -> None:
        if self._alone:
            return
        self._alone = True
        reason = f" after {self._reasons[rank]}" if rank in self._reasons else ""
        print(f"stopped: rank {rank} has ended{reason}; without it rank {self.rank} ends too", file=sys.stderr, flush=True)
        threading.Timer(_GRACE_SECONDS, os._exit, [1]).start()


def _gathered(mine: Any) -> list[Any]:
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def _keep_alive(peer: Connection) -> None:
    """Have the system close the connection some 30 seconds after the other machine is gone."""
    with socket.socket(fileno=os.dup(peer.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):  # Linux
                end.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _read(peer: Connection) -> dict[str, Any] | None:
    """The next message, or None when there will be none."""
    try:
        return json.loads(peer.recv_bytes(_MESSAGE_BYTES))
    except (EOFError, OSError, ValueError):
        return None


def _write(peer: Connection, **message: Any) -> None:
    try:
        peer.send_bytes(json.dumps(message).encode())
    except OSError:  # it has ended: whoever reads from it says so
        return
