"""Whole messages over a socket, each with its length before it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

_LENGTH = struct.Struct(">Q")
_CHUNK = 1 << 18  # bytes read or written at a time


class Channel:
    """One end of a connection.  Blocks only where its socket does.

    Args:
        connection: a stream socket.
        largest: bytes of a message beyond which the other side is taken to be broken.
    """

    def __init__(self, connection: socket.socket, largest: int = 1 << 40) -> None:
        self.connection = connection
        self.largest = largest
        self._received = bytearray()
        self._unsent = bytearray()

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: bytes) -> None:
        """Put a message behind those that ``write`` has still to send."""
        self._unsent += _LENGTH.pack(len(message))
        self._unsent += message

    @property
    def wants_to_write(self) -> bool:
        return len(self._unsent) > 0

    def write(self) -> None:
        """Send as much as the socket takes."""
        while self._unsent:
            try:
                del self._unsent[: self.connection.send(self._unsent[:_CHUNK])]
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):  # gone, which ``read`` will tell after the last words
                self._unsent.clear()

    def read(self) -> list[bytes] | None:
        """The messages that are complete, after one look at the socket; None once the other side has gone.

        Raises:
            ValueError: the other side announces a message that is too large.
        """
        try:
            received = self.connection.recv(_CHUNK)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            return None
        self._received += received
        return list(self._complete()) if received else None

    def messages(self) -> Iterator[bytes]:
        """Every message until the other side goes, for a socket that blocks."""
        while (complete := self.read()) is not None:
            yield from complete

    def close(self) -> None:
        self.connection.close()

    def _complete(self) -> Iterator[bytes]:
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > self.largest:
                raise ValueError(f"a message of {length} bytes, where {self.largest} are allowed")
            end = _LENGTH.size + length
            if len(self._received) < end:
                return
            yield bytes(self._received[_LENGTH.size : end])
            del self._received[:end]
