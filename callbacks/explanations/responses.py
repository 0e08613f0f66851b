"""Rules on what was sampled: rewards, lengths, verdicts.  They watch what ``RolloutMetrics`` logs, once per rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cppo_lightning.callbacks.explanations.rule import Explanation, Rule, Seen

ACCURACY, EQUAL, CUT_OFF = "rollout/accuracy", "rollout/zero_spread_share", "rollout/truncated_share"
UNPARSEABLE, TIMED_OUT, FAILED = (f"rollout/verdict/{outcome}" for outcome in ("unparseable", "timed_out", "failed"))
MAX_TOKENS = "data.sampling.max_tokens"


@dataclass(frozen=True)
class EqualRewards(Rule):
    """Most groups have equal rewards, hence advantages of 0: all right, all wrong, both, cut off or unreadable.

    Args:
        share: of the groups.  Some are equal in any run and cost only their sampling; at four fifths an update of the paper's
            32 groups is left with six.

    Raises:
        ConfigError: ``share`` not in (0, 1].
    """

    watches: ClassVar = (EQUAL, ACCURACY, CUT_OFF, UNPARSEABLE)
    share: float = 0.8

    def __post_init__(self) -> None:
        self.check_shares()

    def __call__(self, seen: Seen) -> Explanation | None:
        equal, accuracy, cut_off, unparseable = (seen.latest[tag] for tag in self.watches)
        if equal < self.share:
            return None
        reason, advice = self._reason(seen, accuracy, cut_off, unparseable)
        return Explanation(
            f"in {equal:.0%} of a rollout's groups all rewards are equal (`{EQUAL}`); of the responses {accuracy:.0%} are "
            f"right, {cut_off:.0%} cut off by the length limit, {unparseable:.0%} unparseable",
            f"such groups have advantages of 0 and are not trained on, and a rollout of nothing else takes no step. {reason}",
            advice,
        )

    def _reason(self, seen: Seen, accuracy: float, cut_off: float, unparseable: float) -> tuple[str, str]:
        refill = "`data.plan.max_refills: 3`, which draws other problems in place of such groups"
        if accuracy >= 0.75:
            return "All right: the problems are too easy for what the model has become.", (
                f"harder problems in `data.prompts`, or end the run; {refill}, while some are left that are not"
            )
        if accuracy >= 0.25:
            return "Some are all right and the others all wrong: few problems are of the model's own level.", (
                f"{refill}, or problems between the two in `data.prompts`"
            )
        if cut_off >= 0.5:
            return "All wrong, because answers are cut off before they are given.", (
                f"{seen.scaled(MAX_TOKENS, 2)}, or a `data.template.text` that asks for a short answer"
            )
        if unparseable >= 0.5:
            return "All wrong, because no answer can be read from them.", (
                "a `data.template.text` that asks for the form that `data.verifier` reads; `samples/0` of callback TextSamples "
                "shows both"
            )
        return "All wrong: the problems are too hard for the model, or their gold answers are not what they ask for.", (
            f"easier problems in `data.prompts`, or {seen.scaled('data.plan.samples', 2)}, so that a rare right answer turns up"
        )


@dataclass(frozen=True)
class CutOff(Rule):
    """Many responses end at the length limit.

    Args:
        share: of the responses.  Some run on in any run; from a quarter on, what is learned is to be short.

    Raises:
        ConfigError: ``share`` not in (0, 1].
    """

    watches: ClassVar = (CUT_OFF, "rollout/response_length")
    share: float = 0.25

    def __post_init__(self) -> None:
        self.check_shares()

    def __call__(self, seen: Seen) -> Explanation | None:
        cut_off, length = (seen.latest[tag] for tag in self.watches)
        if cut_off < self.share:
            return None
        limit = seen.setting(MAX_TOKENS)
        return Explanation(
            f"{cut_off:.0%} of the responses are cut off by the length limit (`{CUT_OFF}`); their mean length is {length:.0f} "
            f"tokens{f' and the limit {limit}' if limit else ''}",
            "a response that is cut off before its answer earns what a wrong one earns, so training favours short responses "
            "over right ones",
            f"{seen.scaled(MAX_TOKENS, 2)}; or, where answers may be shorter, `data.overlong`, which says so in the reward",
        )


@dataclass(frozen=True)
class Unparseable(Rule):
    """No answer can be read from many responses.

    Args:
        share: of the responses.  A model that has not met the form learns it soon; at a third it is most of what is learned.

    Raises:
        ConfigError: ``share`` not in (0, 1].
    """

    watches: ClassVar = (UNPARSEABLE, CUT_OFF)
    share: float = 0.3

    def __post_init__(self) -> None:
        self.check_shares()

    def __call__(self, seen: Seen) -> Explanation | None:
        unparseable, cut_off = (seen.latest[tag] for tag in self.watches)
        if unparseable < self.share:
            return None
        return Explanation(
            f"the verifier finds no answer in {unparseable:.0%} of the responses (`{UNPARSEABLE}`), and {cut_off:.0%} are cut "
            "off by the length limit",
            "they earn what wrong answers earn: the form is learned first, and right answers in another form count for nothing",
            "a `data.template.text` that asks for the form that `data.verifier` reads (MathAnswer: `\\boxed{}` or a line "
            f"`Answer:`); {seen.scaled(MAX_TOKENS, 2)} if they are cut off; `samples/0` of callback TextSamples shows some",
        )


@dataclass(frozen=True)
class VerifierFailures(Rule):
    """The verifier did not come to a verdict.

    Args:
        share: of the responses, killed at the deadline and failed together.  Single ones are odd responses, hundredths a fault.

    Raises:
        ConfigError: ``share`` not in (0, 1].
    """

    watches: ClassVar = (TIMED_OUT, FAILED)
    share: float = 0.02

    def __post_init__(self) -> None:
        self.check_shares()

    def __call__(self, seen: Seen) -> Explanation | None:
        timed_out, failed = (seen.latest[tag] for tag in self.watches)
        if timed_out + failed < self.share:
            return None
        return Explanation(
            f"{timed_out:.1%} of the responses had no verdict at the deadline (`{TIMED_OUT}`), and the verifier failed on "
            f"{failed:.1%} (`{FAILED}`)",
            "they earn 0, as wrong answers do, which is noise in the reward, and each holds up a worker",
            "read what went wrong: `samples/0` of callback TextSamples, `verifier`; then `data.verifier: {class_path: "
            "cppo_lightning.verifiers.VerifierPool, init_args: {verifier: ..., deadline: 20, memory_mb: 4096}}`, with more "
            "`workers` where cores are free",
        )
