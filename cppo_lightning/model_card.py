"""The README.md of an exported model: what it was trained with, and how that went."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# keys of a run's configuration that say what was trained, and not how its machine was used
_TOLD = {
    "trainer": ("max_epochs", "max_steps", "precision", "strategy", "devices", "num_nodes"),
    "model": (
        *("policy", "trust_region", "optimizer", "lr_scheduler", "aggregation", "reference_kl", "anchor", "mismatch"),
        *("max_grad_norm", "micro_batch_tokens"),
    ),
    "data": (
        *("prompts", "template", "max_prompt_tokens", "verifier", "advantages", "overlong", "plan", "sampling", "engine"),
        "seed",
    ),
}
_FAMILIES = ("eval", "rollout", "train", "mask", "budget", "mismatch")  # of metrics; others are texts and waits
_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags: [reinforcement-learning, rlvr, cppo-lightning]
---

# {name}

`{base}`, trained on verified rollouts by `cppo_lightning` under the trust region `{trust_region}`
([CPPO](https://arxiv.org/abs/2606.10968)) in {steps} optimizer steps. The weights are in {dtype}. Training sampled at
temperature {temperature}, as `generation_config.json` says.

## Versions

{versions}

## Metrics

{metrics}

## Settings

```yaml
{settings}```
"""


def model_card(
    name: str,
    run: Mapping[str, Any],
    dtype: str,
    steps: int,
    versions: Mapping[str, str],
    metrics: Mapping[str, tuple[int, float]],
) -> str:
    """The text, with the header that the Hugging Face hub reads.

    Args:
        name: of the exported folder.
        run: its configuration, as ``config.yaml`` has it.
        dtype: of the weights.
        steps: optimizer steps taken.
        versions: of packages that it was trained with, by name.
        metrics: step and value by tag.
    """
    base = os.path.expanduser(run["model"]["policy"]["path"])
    is_local = Path(base).is_dir()
    told = {part: {key: run[part][key] for key in keys if key in run.get(part, {})} for part, keys in _TOLD.items()}
    # where things lie, and which hosts were asked, is nobody else's matter
    if is_local:
        base = Path(base).resolve().name
        told["model"]["policy"] = {**told["model"]["policy"], "path": base}
    hidden = {"prompts": _without_folders, "engine": _kind}
    told["data"] |= {key: hide(told["data"][key]) for key, hide in hidden.items() if key in told["data"]}
    return _CARD.format(
        name=name,
        base_model="" if is_local else f"base_model: {base}\n",
        base=base,
        trust_region=str(run["model"]["trust_region"]["class_path"]).rpartition(".")[2],
        steps=steps,
        dtype=dtype,
        temperature=run["data"]["sampling"]["temperature"],
        versions=_table(("package", "version"), sorted(versions.items())),
        metrics=_table(
            ("tag", "after step", "value"), [(tag, step, f"{value:.4g}") for tag, (step, value) in sorted(metrics.items())]
        ),
        settings=yaml.safe_dump(told, sort_keys=False, allow_unicode=True),
    )


def last_metrics(log_folder: Path, steps: int) -> dict[str, tuple[int, float]]:
    """The last value of each metric in ``log_folder``'s TensorBoard files, up to ``steps`` optimizer steps, after its step."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    if not any(log_folder.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(log_folder), size_guidance={SCALARS: 0}).Reload()
    found = {}
    for tag in events.Tags()[SCALARS]:
        family, _, name = tag.partition("/")
        values = [e for e in events.Scalars(tag) if e.step <= steps]
        if values and family in _FAMILIES and "_at/" not in name:
            found[tag] = (values[-1].step, values[-1].value)
    return found


def _without_folders(value: Any) -> Any:
    """``value`` with the names alone of files that are given by their place on this machine."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    is_placed = isinstance(value, str) and value.startswith(("/", "~/"))
    return Path(value).name or value if is_placed else value  # a slash alone is an operator


def _kind(engine: Mapping[str, Any]) -> dict[str, Any]:
    """The class of an engine and the dtype that it computes in."""
    given = engine.get("init_args") or {}
    return {"class_path": engine["class_path"], "init_args": {key: given[key] for key in ("dtype",) if key in given}}


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    if not rows:
        return "Not found."
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))
