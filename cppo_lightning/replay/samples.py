"""One recorded response, token by token, with what each trust region decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cppo_lightning.batch import Gate
    from cppo_lightning.replay.layout import Place, Recorded


@dataclass(frozen=True)
class SampleView:
    """One response of T tokens, trainable or not, and R trust regions on it."""

    place: Place
    sample: int  # its place in the rank's rollout
    problem: str
    reward: float
    advantage: float
    token_ids: list[int]  # [T]
    texts: list[str] | None  # [T] by the run's tokenizer; None without it
    trainable: list[bool]  # [T]
    mu: list[float]  # [T] probability of the token when it was sampled
    pi: list[float]  # [T] at the update
    divergence: dict[str, list[float]]  # name -> [T] D_t, of the trust regions that tell it
    weight: dict[str, list[float]]  # name -> [T]
    keep: dict[str, list[bool]]  # name -> [T]


def view(recorded: Recorded, row: int, gates: Mapping[str, Gate], model: str) -> SampleView:
    """Row ``row`` of a micro-batch, with the text of its tokens if ``model``'s tokenizer is on this machine."""
    batch = recorded.batch
    length = int(batch.response_mask[row].nonzero().max()) + 1
    ids = batch.response_ids[row, :length].tolist()

    def tokens(values: Any) -> list[Any]:
        return values[row, :length].tolist()

    assert batch.sample is not None
    return SampleView(
        place=recorded.place,
        sample=int(batch.sample[row]),
        problem=recorded.problems[row],
        reward=float(batch.rewards[row]),
        advantage=float(batch.advantages[row]),
        token_ids=ids,
        texts=token_texts(model, ids),
        trainable=tokens(batch.response_mask),
        mu=tokens(batch.rollout_logp.exp()),
        pi=tokens(recorded.logp.exp()),
        divergence={name: tokens(g.diagnostics["divergence"]) for name, g in gates.items() if "divergence" in g.diagnostics},
        weight={name: tokens(gate.weight.float()) for name, gate in gates.items()},
        keep={name: tokens(gate.keep) for name, gate in gates.items()},
    )


def token_texts(model: str, ids: Sequence[int]) -> list[str] | None:
    """Each token's own text; None if the tokenizer is not on this machine.  Nothing is fetched, and no code of it is run."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)
        return [str(tokenizer.decode([i])) for i in ids]
    except (OSError, ValueError, OverflowError):  # a recording may have been made elsewhere
        return None
