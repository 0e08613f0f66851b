"""What a run logs and what the dictionary says are the same, at the steps it says, and TensorBoard shows it in that order."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.program import TensorBoard

import cppo_lightning.callbacks as callbacks
from cppo_lightning.callbacks import GateMetrics, MaskRate, TensorBoardLayout
from cppo_lightning.callbacks.explanations import (
    CutOff,
    EarlyExhaustion,
    EqualRewards,
    LargeDivergence,
    LargeMismatch,
    LowEntropy,
    MostlyDropped,
    Unparseable,
    VerifierFailures,
)
from cppo_lightning.callbacks.tensorboard_layout import BANDS, layout
from cppo_lightning.cli import main
from cppo_lightning.metric_dictionary import SECTIONS, Metric, XAxis, ends, find, metrics
from cppo_lightning.mismatch import USUAL_BOUNDS
from cppo_lightning.verifiers.base import Outcome
from tests import callback_rig

REPOSITORY = Path(__file__).parents[1]
DEBUG = str(REPOSITORY / "configs" / "debug.yaml")
CONFIG = ["--config", DEBUG, "--config", "everything.yaml"]
OF_TENSORBOARD = {"custom_scalars__config__", "epoch"}  # its layout, and what Lightning adds to a validation's numbers

SUMS = """
class_path: cppo_lightning.rollout.ReasoningGymPrompts
init_args: {name: basic_arithmetic, size: 4, params: {min_digits: 1, max_digits: 1}}
"""
# what configs/debug.yaml leaves out, and a budget that no response can keep to
EVERYTHING: dict[str, Any] = {
    "trainer": {
        "max_epochs": 2,
        "enable_checkpointing": True,
        "callbacks+": [
            {"class_path": "cppo_lightning.callbacks.LogProbGap"},
            {"class_path": "cppo_lightning.callbacks.TextSamples", "init_args": {"every_n_rollouts": 1}},
            {"class_path": "cppo_lightning.callbacks.TrustRegionFigures"},
            {
                "class_path": "cppo_lightning.callbacks.EvalAccuracy",
                "init_args": {"datasets": {"sums": yaml.safe_load(SUMS)}, "samples": 2, "every_n_rollouts": 1},
            },
            {
                "class_path": "cppo_lightning.callbacks.AIMEAccuracy",
                "init_args": {"datasets": {"aime": yaml.safe_load(SUMS)}, "samples": 4, "every_n_rollouts": 1},
            },
        ],
    },
    "data": {
        "prompts": {
            "class_path": "cppo_lightning.rollout.Mixture",
            "init_args": {"sources": {"sums": yaml.safe_load(SUMS.replace("size: 4", "size: 50"))}},
        },
        "verifier": {
            "class_path": "cppo_lightning.verifiers.WeightedSum",
            "init_args": {
                "verifiers": {"form": {"class_path": "cppo_lightning.verifiers.Format", "init_args": {"pattern": "[a-m]"}}},
                "weights": {"form": 1.0},
            },
        },
        "evaluation": {"prompts": yaml.safe_load(SUMS), "sampling": {"max_tokens": 8}},
    },
    "model": {"trust_region": {"init_args": {"delta": 0.02, "delta_b": 1.0e-6}}, "reference_kl": {"coef": 0.01}},
}
# callbacks that log nothing and are no part of the run, with the reason
NOT_RUN = {
    "GateMetrics": "abstract",
    "RunCheckpoint": "writes checkpoints",
    "PredictionWriter": "writes what predict samples",
    "RolloutRecorder": "writes rollouts to files",
    "RunSummary": "prints",
}


@dataclass(frozen=True)
class Run:
    """What ``fit``, ``validate`` and ``test`` logged, by tag."""

    folder: Path  # of the logger
    steps: dict[str, list[int]]
    last: dict[str, float]  # scalars of fit alone
    kinds: dict[str, str]
    callbacks: set[str]


@pytest.fixture(scope="module")
def run(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two rollouts of two updates with everything switched on, then both commands that evaluate."""
    folder = tmp_path_factory.mktemp("everything")
    (folder / "models").mkdir()
    (folder / "models" / "tiny").symlink_to(tiny_model_path)
    (folder / "everything.yaml").write_text(yaml.safe_dump(EVERYTHING))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        main(["fit", *CONFIG])
        (fit,) = folder.glob("runs/debug/*")
        (checkpoint,) = fit.rglob("*.ckpt")
        main(["validate", *CONFIG, "--ckpt_path", str(checkpoint)])
        main(["test", *CONFIG])
    steps: dict[str, list[int]] = {}
    last: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for events in sorted(folder.glob("runs/debug/*/events.out.tfevents.*")):
        reader = EventAccumulator(str(events)).Reload()
        for tag in reader.Tags()["scalars"]:
            kinds[tag] = "scalar"
            steps.setdefault(tag, []).extend(event.step for event in reader.Scalars(tag))
            if events.parent == fit:
                last[tag] = reader.Scalars(tag)[-1].value
        for tag in reader.Tags()["images"]:
            kinds[tag] = "image"
            steps.setdefault(tag, []).extend(event.step for event in reader.Images(tag))
        for tag in reader.Tags()["tensors"]:
            kinds[tag.removesuffix("/text_summary")] = "text"
            steps.setdefault(tag.removesuffix("/text_summary"), []).extend(event.step for event in reader.Tensors(tag))
    for tag in OF_TENSORBOARD:
        assert steps.pop(tag)
        assert kinds.pop(tag)
    config = yaml.safe_load((fit / "config.yaml").read_text())
    names = {callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]}
    return Run(
        folder / "runs", steps, last, kinds, names | {"EvaluationReport", "FailureCheckpoint", "Shutdown"}
    )  # what the command line adds


@pytest.fixture(scope="module")
def tensorboard(run: Run) -> str:
    """The address of TensorBoard's own server on the run."""
    program = TensorBoard()
    program.configure(["", "--logdir", str(run.folder), "--port", "0", "--load_fast", "false", "--reload_interval", "0"])
    return program.launch()


def fetch(url: str, body: Any = None, **query: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(f"{url}?{urlencode(query)}" if query else url, data, {"Content-Type": "application/json"})) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_every_tag_that_is_logged_is_in_the_dictionary_once(run: Run) -> None:
    matches = {tag: [metric.tag for _, metric in metrics() if metric.matches(tag)] for tag in run.steps}
    assert {tag: found for tag, found in matches.items() if len(found) != 1} == {}


@pytest.mark.slow
def test_every_entry_is_logged(run: Run) -> None:
    logged = {metric.tag for _, metric in metrics() if any(metric.matches(tag) for tag in run.steps)}
    assert [metric.tag for _, metric in metrics() if metric.tag not in logged] == []
    with_ends = {tag for tag in run.steps if set(ends(tag)) <= run.steps.keys()}
    for _, metric in metrics():
        if metric.interval:
            assert any(re.match(metric.pattern, tag) for tag in with_ends), metric.tag


@pytest.mark.slow
def test_every_callback_takes_part(run: Run) -> None:
    assert run.callbacks.isdisjoint(NOT_RUN)
    assert set(callbacks.__all__) == (run.callbacks & set(callbacks.__all__)) | set(NOT_RUN)


@pytest.mark.slow
def test_kinds(run: Run) -> None:
    told = {tag: panel.kind for tag in run.steps for panel, metric in metrics() if metric.matches(tag)}
    assert told == run.kinds


# two rollouts of two updates, an evaluation before the first and after each
STEPS = {
    XAxis.STEP: {0, 1, 2, 3},
    XAxis.ROLLOUT: {0, 2},
    XAxis.ROLLOUT_END: {1, 3},
    XAxis.EVALUATION: {0, 2, 4},
    XAxis.START: {0},
    XAxis.COMMAND: {0},
}


@pytest.mark.slow
def test_values_stand_where_the_dictionary_says(run: Run) -> None:
    seen: dict[XAxis, set[int]] = {axis: set() for axis in STEPS}
    for panel, metric in metrics():
        for tag in filter(metric.matches, run.steps):
            if panel.x_axis is XAxis.ONCE:
                assert len(run.steps[tag]) == 1
            else:
                assert set(run.steps[tag]) <= STEPS[panel.x_axis], tag
                seen[panel.x_axis] |= set(run.steps[tag])
    assert seen == STEPS
    assert set(run.steps["eval/evaluation/avg@1"]) == {0, 4}  # of test, and of validate with the checkpoint


def test_who_logs_is_shipped() -> None:
    names = {name for panel, _ in metrics() for name in panel.logged_by.split(", ")}
    assert names - {"RLVRModule"} <= set(callbacks.__all__)


GATE_METRICS = [
    cls for cls in map(callbacks.__dict__.get, callbacks.__all__) if inspect.isclass(cls) and issubclass(cls, GateMetrics)
]


@pytest.mark.parametrize("kind", [cls for cls in GATE_METRICS if cls is not GateMetrics], ids=lambda cls: cls.__name__)
def test_names_that_a_gate_callback_declares(kind: type[Any]) -> None:
    callback = kind()
    declared = [*callback._means.names, *callback._maxima.names]
    assert declared
    assert [name for name in declared if find(name) is None] == []
    entries = {metric.tag for panel, metric in metrics() if kind.__name__ in panel.logged_by.split(", ")}
    assert {metric.tag for metric in map(find, declared) if metric is not None} == entries


FAMILIES = "|".join(sorted({metric.tag.split("/")[0] for _, metric in metrics()} - {"<stage>"}))


def constants(source: str) -> set[str]:
    """Texts in a source that are whole tags of a family that the dictionary has."""
    nodes = ast.walk(ast.parse(source))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if re.fullmatch(rf"(?:{FAMILIES})/[\w@/-]*\w", text)}


def test_tags_that_stand_in_the_source() -> None:
    files = [*(REPOSITORY / "callbacks").rglob("*.py"), *(REPOSITORY / "cppo_lightning").rglob("*.py")]
    found = {file.name: constants(file.read_text()) for file in files if "metric_dictionary" not in file.parts}
    assert {"train/loss", "mask/rate", "rollout/staleness"} <= set.union(*found.values())
    # beginnings of tags that another part completes
    heads = {"mask/rate_at", "mismatch/logp_gap_at"}
    assert {(name, tag) for name, tags in found.items() for tag in tags - heads if find(tag) is None} == set()


def test_the_search_sees_a_tag() -> None:
    assert constants('log({"train/new": 1.0, "other/new": 2.0, "train/new is here": 3.0})') == {"train/new"}


@pytest.mark.parametrize(
    ("tag", "entry"),
    [
        ("eval/aime24/avg@16", "eval/<set>/avg@<k>"),
        ("eval/aime24/avg@16_low", "eval/<set>/avg@<k>"),
        ("eval/avg@16_high", "eval/avg@<k>"),
        ("mask/rate_at/00-10", "mask/rate_at/<from>-<to>"),
        ("test/reward", "<stage>/reward"),
        ("rollout/accuracy/my sums", "rollout/accuracy/<set>"),
        ("train/loss_low", None),
        ("train/losses", None),
        ("mask/rate_at/start", None),
        ("mine/train/loss", None),
        ("rollout/verdict/late", None),
    ],
)
def test_find(tag: str, entry: str | None) -> None:
    found = find(tag)
    assert (found and found.tag) == entry


def test_entries_are_told_apart_and_complete() -> None:
    tags = [metric.tag for _, metric in metrics()]
    assert len(set(tags)) == len(tags)
    titles = [section.title for section in SECTIONS] + [panel.title for section in SECTIONS for panel in section.panels]
    assert len(set(titles)) == len(titles)
    for panel, metric in metrics():
        assert panel.unit
        assert metric.meaning.endswith(".")
        assert metric.healthy


def test_ranges_are_those_of_the_code() -> None:
    """Bounds that the texts name are the defaults of what enforces them."""
    speaks = {
        "rollout/zero_spread_share": EqualRewards().share,
        "rollout/truncated_share": CutOff().share,
        "train/entropy": LowEntropy().share,
        "trust_region/divergence_mean": LargeDivergence().share,
        "mismatch/budget_rate": LargeMismatch().share,
        "mismatch/threshold_spent_mean": LargeMismatch().share,
        "budget/exhausted_share": EarlyExhaustion().share,
        "mask/rate": MostlyDropped().share,
    }
    for tag, share in speaks.items():
        assert f"`Explain` speaks at {share:g}" in entry(tag).healthy, tag
    assert f"first {EarlyExhaustion().place:g} of" in entry("budget/exhausted_share").healthy
    verdicts = entry("rollout/verdict/failed").healthy
    assert f"`Explain` speaks at {VerifierFailures().share:g} of both" in verdicts
    assert f"`Explain` speaks at {Unparseable().share:g};" in verdicts
    for family in ("mismatch", "canary"):
        for number, tag in enumerate(("logp_gap_mean", "logp_gap_max")):
            bounds = [_short(USUAL_BOUNDS[dtype][number]) for dtype in ("float32", "bfloat16")]
            assert all(f" {bound}" in entry(f"{family}/{tag}").healthy for bound in bounds), bounds


def entry(tag: str) -> Metric:
    found = find(tag)
    assert found is not None
    return found


def _short(number: float) -> str:
    return f"{number:g}" if number >= 0.1 else f"{number:.0e}".replace("e-0", "e-")


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, REPOSITORY / "docs" / "metrics.py", tmp_path], check=True)
    made, there = ((folder / "metrics.md").read_text() for folder in (tmp_path, REPOSITORY / "docs"))
    assert there == made, "python docs/metrics.py makes it anew"
    rows = re.findall(r"^\| `.*\|$", made, re.MULTILINE)
    assert len(rows) == len(metrics())
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {7}  # six cells


def test_layout_has_charts_for_what_is_logged_alone() -> None:
    found = layout(["mask/rate", "eval/aime24/avg@16", *ends("eval/aime24/avg@16"), "mine/own", "eval/aime25/avg@16"])
    assert list(found) == ["Evaluation", "Mask", BANDS]
    assert list(found["Evaluation"]) == ["avg@k [share]"]
    kind, patterns = found["Evaluation"]["avg@k [share]"]
    assert kind == "Multiline"
    assert any(re.match(pattern, "eval/aime25/avg@16") for pattern in patterns)
    assert not any(re.match(pattern, "eval/aime24/avg@16_low") for pattern in patterns)
    tag = "eval/aime24/avg@16"
    assert found[BANDS] == {f"{tag} [share]": ["Margin", [tag, f"{tag}_low", f"{tag}_high"]]}
    assert list(found["Mask"]) == ["Dropped tokens [share]"]


def test_a_resumed_run_keeps_its_charts_and_one_without_the_command_line_has_no_settings(tmp_path: Path) -> None:
    kept = TensorBoardLayout()
    before = TensorBoardLayout()
    before.load_state_dict({"tags": ["rollout/reward", "mine/own"]})
    kept.load_state_dict(before.state_dict())
    outcomes = [[Outcome.CORRECT, Outcome.WRONG]] * 2
    callback_rig.trainer(tmp_path, [MaskRate(), kept]).fit(callback_rig.Module(), datamodule=callback_rig.Data(outcomes))
    found = callback_rig.events(tmp_path)
    (written,) = found.Tensors("custom_scalars__config__")  # after the first update there is nothing new
    shown = Layout.FromString(written.tensor_proto.string_val[0])
    assert [category.title for category in shown.category] == ["Rollouts", "Mask"]
    with pytest.raises(KeyError, match="hparams"):
        found.PluginTagToContent("hparams")


@pytest.mark.slow
def test_tensorboard_shows_every_chart_with_data_and_in_order(run: Run, tensorboard: str) -> None:
    shown = fetch(f"{tensorboard}data/plugin/custom_scalars/layout")["category"]
    titles = [section.title for section in SECTIONS if any(panel.kind == "scalar" for panel in section.panels)]
    assert [category["title"] for category in shown] == [*titles, BANDS]
    in_charts: set[str] = set()
    for chart in (chart for category in shown for chart in category["chart"]):
        if "margin" in chart:
            (series,) = chart["margin"]["series"]
            drawn = {series["value"], series["lower"], series["upper"]}
            assert drawn <= run.last.keys()
        else:
            joined = "|".join(f"({pattern})" for pattern in chart["multiline"]["tag"])  # as the page asks
            answer = fetch(f"{tensorboard}data/plugin/custom_scalars/scalars", tag=joined, run="debug/version_0")
            drawn = set(answer["tag_to_events"])
        assert drawn, chart["title"]
        in_charts |= drawn
    assert in_charts == run.last.keys()


@pytest.mark.slow
def test_tensorboard_shows_settings_beside_results(run: Run, tensorboard: str) -> None:
    columns = fetch(f"{tensorboard}data/plugin/hparams/experiment", {"experimentName": ""})
    wanted = ["train/loss", "rollout/reward", "eval/avg@2"]
    asked = {
        "startIndex": 0,
        "sliceSize": 10,
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"hparam": info["name"]} for info in columns["hparamInfos"]]
        + [{"metric": {"tag": tag, "group": ""}} for tag in wanted],
    }
    (group,) = fetch(f"{tensorboard}data/plugin/hparams/session_groups", asked)["sessionGroups"]
    settings = group["hparams"]
    assert settings["model.optimizer.init_args.lr"] == 1e-3
    assert settings["model.trust_region.class_path"] == "cppo_lightning.trust_regions.CPPO"
    assert settings["model.trust_region.init_args.delta_b"] == 1e-6
    assert settings["trainer.enable_checkpointing"] == "true"
    assert "trainer.callbacks" not in settings
    results = {value["name"]["tag"]: value for value in group["metricValues"]}
    for tag in wanted:
        assert results[tag]["value"] == pytest.approx(run.last[tag])
    assert [session["status"] for session in group["sessions"]] == ["STATUS_SUCCESS"]
