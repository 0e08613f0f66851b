"""Sweeps of a study in one process that has imported everything once: one left alone, and one killed and started again.

    python -m tests.sweep_rig FOLDER STUDY

``FOLDER/alone`` and ``FOLDER/killed`` hold what they leave, ``FOLDER/before.json`` which results were there at the kill.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from benchmarks.comparison import __main__ as comparison
from benchmarks.comparison import arithmetic


def forked(arguments: list[str], killed: bool = False) -> int:
    """The exit code of ``python -m benchmarks.comparison``, below 0 where it was killed with its group, at its first result."""
    process = os.fork()
    if not process:
        os.setpgid(0, 0)
        if killed:
            from benchmarks.comparison.board import Board

            Board.ended = lambda self, run, seconds, accuracy: os.killpg(0, signal.SIGKILL)  # type: ignore[method-assign]
        os._exit(comparison.main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def results(folder: Path) -> dict[str, int]:
    """When each result in a sweep's folder was written."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in sorted(folder.rglob("result.parquet"))}


def main() -> None:
    folder, study = sys.argv[1:]
    os.environ.update(arithmetic.settings())
    from benchmarks.comparison import sweep  # noqa: F401  (before anything is forked)

    def command(name: str) -> list[str]:
        shutil.copytree(Path(folder, "models"), Path(folder, name, "models"), dirs_exist_ok=True)
        return ["run", "--study", study, "--folder", str(Path(folder, name))]

    assert forked(command("alone")) == 0
    assert forked(command("killed"), killed=True) == -signal.SIGKILL
    before = results(Path(folder, "killed"))
    assert forked(command("killed")) == 0
    Path(folder, "before.json").write_text(json.dumps(before))


if __name__ == "__main__":
    main()
