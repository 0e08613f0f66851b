"""Runs a command, ends all of it when the process that asked for it dies, however that dies, and then deletes its folder.

    python supervisor.py PARENT_PID FOLDER COMMAND...

Run as a script, in a session of its own, so that it needs nothing but Python.  A SIGTERM to the group is left to the command.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 10.0


def main(parent: int, folder: str, command: list[str]) -> int:
    # a handler, since what is ignored would be ignored by the command as well
    signal.signal(signal.SIGTERM, lambda *_: None)
    child = subprocess.Popen(command)
    # PR_SET_PDEATHSIG would go off at the end of the thread that started this, and reach this one process alone
    while os.getppid() == parent:
        try:
            return child.wait(_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    os.killpg(0, signal.SIGTERM)
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        print("the command outlived SIGTERM", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)  # the supervisors of the run's other servers are at it as well
    os.killpg(0, signal.SIGKILL)  # and with it whatever the command has left, and this process
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
