"""Which groups of a rollout are trained on together."""

from __future__ import annotations

from collections.abc import Mapping


def dealt(tokens: Mapping[int, int], updates: int) -> list[list[int]]:
    """Groups for each update, of about as many tokens each: ranks deal by themselves and wait for each other at every update.

    Numbers of groups differ by one at most, the first updates have more.  Which share is trained on first follows from the
    numbers of its groups, not from their lengths: long groups are trained on at no other staleness than short ones.

    Args:
        tokens: of each group, by its number.
        updates: optimizer steps that the groups are for; with fewer groups than that the last get none.
    """
    few, more = divmod(len(tokens), updates)
    room = [few + (update < more) for update in range(updates)]
    shares: list[list[int]] = [[] for _ in room]
    for group in sorted(tokens, key=lambda group: (-tokens[group], group)):
        free = [share for share, most in zip(shares, room, strict=True) if len(share) < most]
        min(free, key=lambda share: sum(tokens[other] for other in share)).append(group)
    return sorted(map(sorted, shares), key=lambda share: (-len(share), share))
