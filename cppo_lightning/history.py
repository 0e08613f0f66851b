"""A run's past in bounded memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SumHistory:
    """Sums of one rollout after the other, in at most ``limit`` rows.

    When all rows are full, neighbours are added up and each holds twice as many rollouts, so that the whole run stays in sight.

    Args:
        limit: rows, an even number of at least 2.

    Raises:
        ValueError: another ``limit``.
    """

    def __init__(self, limit: int) -> None:
        if limit < 2 or limit % 2:
            raise ValueError(f"limit must be even and at least 2, got {limit}")
        self.limit = limit
        self.per_row = 1  # rollouts in each row
        self.in_last = 0  # rollouts in the last row so far
        self.starts: list[int] = []  # optimizer steps before each row's first rollout
        self.ends: list[int] = []  # and after its last
        self.rows: list[Tensor] = []  # [C] each

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, start: int, end: int, sums: Tensor) -> None:
        """Append one rollout's sums ``[C]``, trained on in optimizer steps ``start`` to ``end``."""
        if self.rows and self.in_last < self.per_row:
            self.ends[-1], self.rows[-1], self.in_last = end, self.rows[-1] + sums, self.in_last + 1
            return
        if len(self.rows) == self.limit:
            self._fold()
        self.starts.append(start)
        self.ends.append(end)
        self.rows.append(sums.clone())
        self.in_last = 1

    def _fold(self) -> None:
        """Add neighbours up; a last row that has none stays, to be filled."""
        pairs = [slice(i, i + 2) for i in range(0, len(self.rows), 2)]
        if len(self.rows) % 2 == 0:
            self.in_last += self.per_row
        self.starts, self.ends = self.starts[::2], [self.ends[pair][-1] for pair in pairs]
        self.rows = [torch.stack(self.rows[pair]).sum(0) for pair in pairs]
        self.per_row *= 2

    def table(self) -> Tensor:
        """The sums ``[R, C]``, one row at least.

        Raises:
            RuntimeError: nothing was added.
        """
        return torch.stack(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {**{name: vars(self)[name] for name in ("per_row", "in_last", "starts", "ends")}, "rows": list(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, in rows that hold more rollouts where there are more than ``limit``."""
        self.per_row, self.in_last = state["per_row"], state["in_last"]
        self.starts, self.ends, self.rows = list(state["starts"]), list(state["ends"]), list(state["rows"])
        while len(self.rows) > self.limit:
            self._fold()
