"""Who listens at a port of this machine."""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path

_TABLES = Path("/proc/net")
_LISTENS = "0A"  # the state's number


def listens_as_us(address: str, port: int) -> bool:
    """Whether a socket of this user listens at ``address``, an IP address of this machine; True where there is no /proc."""
    packed = ipaddress.ip_address(address).packed
    table = _TABLES / ("tcp" if len(packed) == 4 else "tcp6")
    if not table.exists():
        return True
    # each four bytes are shown as a number in the machine's own byte order
    words = (int.from_bytes(packed[i : i + 4], sys.byteorder) for i in range(0, len(packed), 4))
    place = "".join(f"{word:08X}" for word in words) + f":{port:04X}"
    with table.open() as rows:  # those that listen come first
        for _, local, _, state, _, _, _, user, *_ in map(str.split, rows):
            if (local, state) == (place, _LISTENS):
                return int(user) == os.geteuid()
    return False
