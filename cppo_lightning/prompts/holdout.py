"""Which questions are held out: a function of their text alone, so that no seed or size mixes the two parts."""

from __future__ import annotations

import hashlib
from typing import Literal

from cppo_lightning.errors import ConfigError

Split = Literal["train", "heldout"]


def in_split(text: str, split: Split, heldout_share: float) -> bool:
    """Whether a question belongs to ``split``, where ``heldout_share`` of all possible ones are "heldout"."""
    digest = hashlib.sha256(text.encode()).digest()
    held_out = int.from_bytes(digest[:8], "big") < heldout_share * 2**64
    return held_out is (split == "heldout")


def check_split(owner: str, split: str, heldout_share: float) -> None:
    """Raise :class:`ConfigError` for a share outside [0, 1), another word than the two, or a part that is empty."""
    if not 0 <= heldout_share < 1:
        raise ConfigError(f"{owner}.heldout_share must be in [0, 1), got {heldout_share}")
    if split not in ("train", "heldout"):
        raise ConfigError(f"{owner}.split must be 'train' or 'heldout', got {split!r}")
    if split == "heldout" and heldout_share == 0:
        raise ConfigError(f"{owner}.split is 'heldout', which is empty while heldout_share is 0")
