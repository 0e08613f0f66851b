"""A run that says once what looks wrong or odd in it, what that means, and what to try."""

from __future__ import annotations

import math
import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from cppo_lightning.callbacks.explanations import RULES, Explanation, Rule, Seen
from cppo_lightning.callbacks.reporting import tensorboards

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

COLUMNS = 120  # at most: a narrower terminal would break lines anywhere
_NO_BREAK = "\xa0"


class Explain(Callback):
    """Says what it saw, what that means and what to try: in the terminal, above any progress bar, and in TensorBoard as text.

    Each rule speaks once in a run, resumed or not, when its condition is first met; its text in TensorBoard is
    ``explain/<rule>``.  Rules read the metrics that the module and other callbacks log, over all ranks, so one that watches
    what nobody logs is silent; a metric that is NaN counts as not logged.  The rules that are there, and their thresholds:
    ``cppo_lightning.callbacks.explanations``.

    Args:
        rules: by name, rules that are put beside those that are there, or in the place of one; null takes one away.
    """

    def __init__(self, rules: dict[str, Rule | None] | None = None) -> None:
        super().__init__()
        self.rules = {name: rule for name, rule in {**RULES, **(rules or {})}.items() if rule is not None}
        self.told: set[str] = set()  # names of the rules that have spoken
        self._first: dict[str, float] = {}
        self._latest: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"told": sorted(self.told), "first": dict(self._first)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.told, self._first = set(state_dict["told"]), dict(state_dict["first"])

    def on_metrics(self, trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
        """Runs after metrics that belong together were logged: asks the rules that watch some of them."""
        if not trainer.is_global_zero:
            return
        known = {tag: value for tag, value in metrics.items() if not math.isnan(value)}  # NaN is neither above nor below
        self._latest.update(known)
        asked = {name: rule for name, rule in self.rules.items() if known.keys() >= set(rule.watches)}
        for name, rule in asked.items():
            for tag in rule.watches:
                self._first.setdefault(tag, known[tag])
            if name in self.told:
                continue
            explanation = rule(Seen(step, self._latest, self._first, lambda key: setting(trainer, key)))
            if explanation is not None:
                self.told.add(name)
                _tell(trainer, name, explanation, step)


def setting(trainer: Trainer, key: str) -> Any:
    """The run's value of a YAML key such as ``model.trust_region.init_args.delta``; None where there is none."""
    root, *path = key.split(".")
    found = {"model": trainer.lightning_module, "data": getattr(trainer, "datamodule", None), "trainer": trainer}.get(root)
    for name in path:
        if name != "init_args":
            found = getattr(found, name, None)
    return found


def _tell(trainer: Trainer, name: str, explanation: Explanation, step: int) -> None:
    parts = {"saw": explanation.saw, "means": explanation.means, "try": explanation.advice}
    wrapped = [_wrapped(title, text) for title, text in parts.items()]
    trainer.lightning_module.print("\n".join([f"Explain: {name}, at step {step}", *wrapped]))
    for writer in tensorboards(trainer):
        writer.add_text(f"explain/{name}", "\n\n".join(f"**{title}**: {text}" for title, text in parts.items()), step)
        writer.flush()


def _wrapped(title: str, text: str) -> str:
    """Lines for a terminal, of which each holds what stands between backticks whole: it is to be copied."""
    joined = re.sub("`[^`]*`", lambda found: found[0].replace(" ", _NO_BREAK), text)
    columns = min(COLUMNS, shutil.get_terminal_size((COLUMNS, 0)).columns)
    wrapper = textwrap.TextWrapper(columns, f"  {title:<6}", " " * 8, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapper.wrap(joined)).replace(_NO_BREAK, " ")
