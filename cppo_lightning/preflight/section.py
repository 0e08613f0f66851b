"""What a part of the preflight has found, ready to be printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Row = tuple[str, str, str]  # what it is, its value, and how that comes about


@dataclass(frozen=True)
class Section:
    """One table, with what should be looked at before the run is started."""

    title: str
    rows: Sequence[Row]
    warnings: Sequence[str] = ()
    body: RenderableType | None = None  # what no row has room for

    def print(self, console: Console) -> None:
        table = Table(
            title=self.title, title_justify="left", box=SIMPLE, show_header=False, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for style in ("", "bold", "dim"):
            table.add_column(style=style, overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))  # a gold answer or a path is no markup, data.jsonl:100: no emoji
        console.print(table, highlight=False)
        if self.body is not None:
            console.print(self.body, markup=False, emoji=False, highlight=False)


def size(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def number(count: float) -> str:
    """A count with its thousands apart."""
    return f"{count:,.0f}"


def plural(count: int, what: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number(count)} {what}{'' if count == 1 else 's'}"
