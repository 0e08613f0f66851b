"""DAPO-Math (arXiv 2503.14476): the layout of its rows and the instructions around its questions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

DAPO_KEYS = ("prompt", "reward_model.ground_truth", "extra_info.index")  # problem, answer, id

_BOX = r"\\boxed\s*\{[^{}\n]*\}"
_HEADER = re.compile(
    r"\s*Solve the following math problem step by step\.\s*"
    rf"(?:The last line of your response should be of the form \"?Answer:\s*(?:\$Answer|{_BOX})\"?,?\s*"
    r"(?:\(without quotes\)\s*)?(?:,?\s*where \$Answer is the answer to the problem)?\.)?\s*",
    re.IGNORECASE,
)
_FOOTER = re.compile(
    rf"(?:Remember to put your answer on its own line (?:after \"Answer:\"|as \"Answer:\s*{_BOX}\")"
    r"(?:,? and you do not need to use a \\boxed command)?"
    rf"|(?:Please |Let's )(?:reason|think) step by step,? and (?:put|output) (?:your|the) final answer within {_BOX}"
    rf"|Please output the final answer within {_BOX})\.?\s*\Z",
    re.IGNORECASE,
)


def bare_question(text: str) -> str:
    r"""A question without what DAPO-Math and its re-uploads write around it, stripped.

    Taken off are the header ("Solve the following math problem step by step. The last line of your response should be of the
    form Answer: $Answer ...", or ``Answer: \boxed{$Answer}``) and the footer ('Remember to put your answer on its own line
    after "Answer:".', and the requests of other sets for a final ``\boxed{}``).  Any other text comes back as it is.
    """
    header = _HEADER.match(text)
    question = text[header.end() :] if header else text
    return _FOOTER.sub("", question).strip()


def is_dapo(row: Mapping[str, Any]) -> bool:
    """Whether a row has DAPO-Math's columns: ``prompt``, a list of messages, and ``reward_model``, with the answer."""
    return isinstance(row.get("prompt"), list) and "reward_model" in row


def dapo_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of such a row that make a problem, named by :data:`DAPO_KEYS`; those that it lacks are left out."""
    flat: dict[str, Any] = {}
    for key in DAPO_KEYS:
        outer, _, inner = key.partition(".")
        value = row.get(outer)
        if not inner:
            flat[key] = value
        elif isinstance(value, Mapping) and inner in value:
            flat[key] = value[inner]
    return flat
