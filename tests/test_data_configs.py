"""``configs/data``: each file parses over any run's config and leaves nothing of the data below it, and one of them trains."""

from __future__ import annotations

import json
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from cppo_lightning.cli import main
from cppo_lightning.prompts import BadRows, LoadCounts, PromptSource
from cppo_lightning.prompts.templates import PromptTemplate
from cppo_lightning.rollout.evaluation import Evaluation
from cppo_lightning.rollout.sampler import Sampler
from cppo_lightning.verifiers import Problem, Verifier
from tests.test_presets import contains, printed, read
from tests.test_prompts import FOOTER, HEADER, dapo_row, shared

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
UNDER = [["debug"], ["quickstart"], ["base", "trust_region/cppo"]]
# As the sets' own pages give their columns: one row of each, in the hub's layout.
HUB_ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    "math": {"problem": "1 + 1?", "level": "Level 1", "type": "Prealgebra", "solution": "It is $1+1=\\boxed{2}$."},
    "dapo_math": {
        "data_source": "math_dapo",
        "prompt": [{"content": "1 + 1?", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
    },
}
AIME_ROWS: dict[str, dict[str, Any]] = {
    "aime24": {"id": 60, "problem": "1 + 1?", "solution": "\\boxed{2}", "url": ""},
    "aime25": {"id": "0", "problem": "1 + 1?", "answer": "2"},
    "aime26": {"id": "0", "problem": "1 + 1?", "answer": "2"},
}


def sources_of(name: str, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sources of an evaluation or of a mixture by name, or the one there is."""
    data = config["data"]
    if name == "aime_eval":
        return data["evaluation"]["datasets"]
    return data["prompts"]["init_args"].get("sources", {"": data["prompts"]})


def built(kind: type, settings: dict[str, Any]) -> Any:
    """An object from a config's settings, from these alone."""
    parser = ArgumentParser()
    parser.add_argument("--it", type=kind)
    return parser.instantiate(parser.parse_object({"it": deepcopy(settings)}))["it"]


def test_there_are_configs() -> None:
    assert NAMES == ["aime_eval", "dapo_math", "gsm8k", "math", "mixture"]


@pytest.mark.parametrize("name", NAMES)
def test_a_data_config_is_about_data_and_says_how_to_run_it(name: str) -> None:
    config = read(f"data/{name}")
    assert list(config) == ["data"]
    assert set(config["data"]) == {"evaluation" if name == "aime_eval" else "prompts", "template", "verifier"}
    for source in sources_of(name, config).values():
        # what is left out would be inherited from a config below, where another class has a setting of that name
        assert set(source["init_args"]) == {field.name for field in fields(type(built(PromptSource, source)))}
    comment = (CONFIGS / "data" / f"{name}.yaml").read_text().partition("data:")[0]
    assert "#   python -m cppo_lightning " in comment
    assert f"--config configs/data/{name}.yaml" in comment


@pytest.mark.parametrize("under", UNDER, ids=lambda under: under[0])
@pytest.mark.parametrize("name", NAMES)
def test_a_data_config_replaces_the_data_below_it(name: str, under: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As parsed by the command line, nothing of the other's settings stays."""
    config, chosen = read(f"data/{name}"), printed(capsys, *under, f"data/{name}")
    assert contains(chosen, config)
    there, wanted = (
        {set_name: built(PromptSource, source) for set_name, source in sources_of(name, found).items()}
        for found in (chosen, config)
    )
    assert there == wanted
    assert built(Verifier, chosen["data"]["verifier"]) == built(Verifier, config["data"]["verifier"])
    assert contains(chosen["data"]["plan"], read(under[0])["data"]["plan"])


@pytest.mark.parametrize("name", HUB_ROWS)
def test_the_hubs_layout_is_what_a_config_reads(name: str, tmp_path: Path) -> None:
    """With the path alone replaced by a file."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(HUB_ROWS[name]) + "\n")
    settings = read(f"data/{name}")["data"]["prompts"]
    source = built(PromptSource, {**settings, "init_args": {**settings["init_args"], "path": str(file)}})
    rows = BadRows()
    assert [(p.messages[0]["content"], p.answer) for p in source.load(rows)] == [("1 + 1?", "2")]
    assert rows.counts == LoadCounts(rows=1)


def test_the_aime_sets_layouts_are_what_their_config_reads(tmp_path: Path) -> None:
    settings = read("data/aime_eval")["data"]["evaluation"]
    for name, source in settings["datasets"].items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(AIME_ROWS[name]) + "\n")
        assert source["init_args"]["path"] == f"math-ai/{name}"
        source["init_args"]["path"] = str(file)
    sets = built(Evaluation, settings).sets
    assert {name: [p.answer for p in source.load()] for name, source in sets.items()} == {name: ["2"] for name in AIME_ROWS}


def test_the_prompts_of_a_data_config_ask_for_a_box() -> None:
    """YAML's escapes and Jinja's braces both pass through."""
    for name in set(NAMES) - {"dapo_math", "aime_eval"}:
        assert "\n\nPlease" in read(f"data/{name}")["data"]["template"]["text"]
        assert r"\boxed{" in read(f"data/{name}")["data"]["template"]["text"]


IN_DAPOS_WORDS = ["base", "data/dapo_math", "data/aime_eval"]


def asked(name: str, problem: Problem) -> list[dict[str, str]]:
    """The turns that a config's template makes of a problem."""
    return built(PromptTemplate, read(name)["data"]["template"]).messages(problem)


@pytest.mark.parametrize("name", IN_DAPOS_WORDS)
def test_aime_and_sums_are_asked_for_the_answer_that_dapo_asks_for(name: str) -> None:
    (turn,) = asked(name, Problem("", ({"role": "user", "content": "1 + 1?"},), "2"))
    assert turn["content"] == HEADER + "1 + 1?" + FOOTER


@pytest.mark.parametrize("name", ["base", "data/dapo_math"])
@pytest.mark.parametrize("rows", ["made up", "dapo_schema_sample", "dapo_schema_aime2024"])
def test_dapos_prompts_are_its_rows_byte_for_byte(name: str, rows: str, tmp_path: Path) -> None:
    """Though a config takes the words around the question off, and its template puts them back."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(dapo_row("What is $1 + 1$?", "2", "a")) if rows == "made up" else shared(rows).read_text())
    source = read(name)["data"]["prompts"]
    problems = built(PromptSource, {**source, "init_args": {**source["init_args"], "path": str(file)}}).load()
    written = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    assert [asked(name, problem) for problem in problems] == written
    assert problems[0].messages[0]["content"] != written[0][0]["content"]


def test_a_mixture_trains_from_the_command_line(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three to one, with one set's file given on the command line; what was sampled is what the weights say."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(5)]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seen: list[str] = []
    sample = Sampler.sample

    def watched(self: Sampler, problems: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(problem.dataset for problem in problems)
        return sample(self, problems, *args, **kwargs)

    monkeypatch.setattr(Sampler, "sample", watched)
    source = "--data.prompts.init_args.sources"
    main(
        [
            "fit",
            *(part for name in ("debug", "data/mixture") for part in ("--config", f"{CONFIGS}/{name}.yaml")),
            f"--model.policy.path={tiny_model_path}",
            f"{source}.gsm8k.init_args.path=gsm8k.jsonl",
            f"{source}.sums.init_args.size=10",
        ]
    )
    assert Counter(seen) == {"gsm8k": 9, "sums": 3}
    (saved,) = tmp_path.rglob("config.yaml")
    assert contains(yaml.safe_load(saved.read_text()), {"data": {"template": read("data/mixture")["data"]["template"]}})
