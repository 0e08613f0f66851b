"""A name stands for something whole: how that is replaced, and where it is found if a kill comes in between."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

_ASIDE = ".old"  # ends the hidden name of what is being replaced
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # exchange names; NFS and CephFS say the first


def put(new: Path, place: Path) -> None:
    """Rename ``new`` to ``place``, also where something has that name, which is deleted when this is on the disk.

    The two names are exchanged in one step where system and file system can.  Elsewhere, as on NFS, what is there is renamed
    first, and :func:`standing` finds it if the process is killed before ``new`` has the name.
    """
    aside = _aside(place)
    if not (os.path.lexists(place) and _exchange(new, place)):
        if os.path.lexists(place):
            _delete(aside)
            place.rename(aside)
        new.rename(place)
    names_to_disk(place.parent)
    for old in (new, aside):
        _delete(old)


def standing(path: str | Path) -> str:
    """``path``, or the name under which a :func:`put` that was killed has left what stood there."""
    aside = _aside(Path(path))
    return str(aside if aside.exists() and not os.path.lexists(path) else path)


def left_standing(folder: Path, pattern: str) -> set[str]:
    """What :func:`standing` finds under another name in ``folder``, of names like ``pattern``."""
    names = {folder / aside.name[1 : -len(_ASIDE)] for aside in folder.glob(f".{pattern}{_ASIDE}")}
    return {standing(name) for name in names if not os.path.lexists(name)}


def names_to_disk(folder: Path) -> None:
    """Return when the names in ``folder`` are on the disk, as ``fsync`` has a file's content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}{_ASIDE}"


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once, since folders cannot be renamed over another; False where that cannot be done."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux with glibc has it
    if rename is None:
        return False
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
