"""What a page of Markdown asks a reader to save and to type."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that it is to be saved as, from its first line; JSON Lines have no comments, and there is one of them."""
        if self.language == "jsonl":
            return "problems.jsonl"
        found = re.match(r"# (\S+\.(?:py|yaml))\n", self.text)
        return found.group(1) if found else None

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, continued ones joined; remarks, the shell's and SLURM's, are none."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines() if self.language in ("sh", "bash") else []
        return [line for line in lines if line and not line.startswith("#")]


def blocks_of(page: str) -> list[Block]:
    """All fenced blocks, in order."""
    return [Block(language, text) for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)]


def files_of(blocks: list[Block]) -> dict[str, str]:
    """The text of each file that a reader is to save, by name."""
    return {block.file: block.text for block in blocks if block.file is not None}


def contains(whole: object, part: object) -> bool:
    """Whether every key of ``part`` has its value in ``whole``."""
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return whole == part
