"""``python -m cppo_lightning replay RUN --config a.yaml --config b.yaml``: recorded tokens under other trust regions.

RUN is the log folder of a run with the callback RolloutRecorder.  No model and no engine is loaded.  Each --config is a YAML
file with model.trust_region, such as those in configs/trust_region/, and is shown under the name of the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(args: Sequence[str] | None = None) -> None:
    """The command; ``--help`` says what it takes."""
    parser = argparse.ArgumentParser(
        "python -m cppo_lightning replay",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's log folder, or its folder recording/")
    parser.add_argument("--config", type=Path, action="append", default=[], help="a file with model.trust_region; any number")
    parser.add_argument("--sample", type=int, help="show this response token by token, counted from 0 in the run's order")
    parser.add_argument("--slices", type=int, default=10, help="of a response's length, for numbers by position (1 to 100)")
    parser.add_argument("--output", type=Path, help="folder for figures and numbers; without it, RUN/replay")
    given = parser.parse_args(args)
    run(given.run, given.config, given.sample, given.slices, given.output)


def run(run: Path, configs: Sequence[Path], sample: int | None, slices: int, output: Path | None) -> None:
    """Replay, print tables, and write ``replay.json`` and PNG files to ``output`` (None: ``replay`` in the run's folder).

    Raises:
        ConfigError: ``run`` holds no recording, or something that was asked cannot be had of it.
    """
    from rich.console import Console

    from cppo_lightning.errors import ConfigError
    from cppo_lightning.replay.replaying import replay
    from cppo_lightning.replay.report import draw, show, write_numbers
    from cppo_lightning.replay.run_card import recording_of

    if not 1 <= slices <= 100:
        raise ConfigError(f"--slices must be from 1 to 100, got {slices}")
    found = replay(recording_of(run), configs, slices, sample)
    console = Console()
    show(found, console)
    folder = output or run / "replay"
    written = [write_numbers(found, folder), *draw(found.comparison, folder)]
    console.print(f"written to {folder}: {', '.join(path.name for path in written)}", soft_wrap=True, markup=False)
