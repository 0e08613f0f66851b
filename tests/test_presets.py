"""Every shipped config: it parses over what it may be put upon, says what its name promises, and trains."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cppo_lightning.cli import main
from cppo_lightning.trust_regions import TrustRegion

CONFIGS = Path(__file__).parents[1] / "configs"
TRUST_REGIONS = sorted(p.stem for p in (CONFIGS / "trust_region").glob("*.yaml"))
PAPER = sorted(p.stem for p in (CONFIGS / "paper").glob("*.yaml"))
# arXiv 2606.10968, Table 3: prompts, samples, updates, longest response, delta, lower end of delta_b, adaptive, T_stop
TABLE_3: dict[str, tuple[int, int, int, int, float, float, bool, int]] = {
    "qwen3_1.7b": (64, 8, 2, 8192, 0.15, 0.015, False, 1120),
    "qwen3_1.7b_base": (64, 8, 2, 8192, 0.15, 0.02, True, 680),
    "qwen3_8b_base": (128, 8, 4, 8192, 0.15, 0.02, True, 490),
    "qwen3_30b_a3b_base": (256, 16, 8, 16384, 0.2, 0.02, True, 560),
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def printed(capsys: pytest.CaptureFixture[str], *names: str) -> dict[str, Any]:
    """The settings that these configs, each over those before it, come to."""
    with pytest.raises(SystemExit) as end:
        main(["fit", *(part for name in names for part in ("--config", f"{CONFIGS}/{name}.yaml")), "--print_config"])
    assert end.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def built(config: dict[str, Any]) -> TrustRegion:
    """The trust region of a config's settings, from these alone."""
    parser = ArgumentParser()
    parser.add_argument("--trust_region", type=TrustRegion)
    return parser.instantiate(parser.parse_object({"trust_region": config["model"]["trust_region"]}))["trust_region"]


def contains(whole: Any, part: Any) -> bool:
    """Whether every setting of ``part`` stands in ``whole``."""
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return whole == part


def test_there_are_configs() -> None:
    assert set(PAPER) == set(TABLE_3)
    assert len(TRUST_REGIONS) > 20


def test_every_config_is_tested() -> None:
    """A config elsewhere than here is one that test_cli, test_chain or, of strategies, test_parallel parses."""
    others = {
        str(p.relative_to(CONFIGS))
        for p in CONFIGS.rglob("*.yaml")
        if p.parent.name not in ("trust_region", "paper", "data", "strategy", "chain")
    }
    assert others == {"base.yaml", "debug.yaml", "quickstart.yaml", "quickstart_vllm.yaml", "sums.yaml"}


def names_every_setting(given: Any) -> bool:
    """Whether each class in a config comes with all of its settings."""
    if isinstance(given, list):
        return all(map(names_every_setting, given))
    if not isinstance(given, dict):
        return True
    module, name = given["class_path"].rsplit(".", 1)
    settings = given.get("init_args", {})
    own = {field.name for field in fields(getattr(import_module(module), name))}
    return set(settings) == own and all(map(names_every_setting, settings.values()))


@pytest.mark.parametrize("name", [f"trust_region/{name}" for name in TRUST_REGIONS] + [f"paper/{name}" for name in PAPER])
def test_a_trust_region_names_all_of_its_settings(name: str) -> None:
    """The parser keeps what a later file does not name, if the class there has it too: what is left out would be inherited."""
    assert names_every_setting(read(name)["model"]["trust_region"])
    assert (CONFIGS / f"{name}.yaml").read_text().startswith("# "), "its source"


@pytest.mark.parametrize("name", TRUST_REGIONS)
def test_a_trust_region_config_changes_nothing_else(name: str) -> None:
    config = read(f"trust_region/{name}")
    assert list(config) == ["model"]
    assert set(config["model"]) - {"aggregation"} == {"trust_region"}  # a method may be defined with its aggregation


# Under each other: debug's CPPO, which is another than the paper's, one of the paper's, and in turn each of its others, which
# differ from that one in numbers alone.
OTHERS = [name for name in PAPER if "30b" not in name]
UNDER = [
    (name, under)
    for i, name in enumerate(TRUST_REGIONS)
    for under in (["debug"], ["base", "paper/qwen3_30b_a3b_base"], ["base", f"paper/{OTHERS[i % len(OTHERS)]}"])
]


@pytest.mark.parametrize(("name", "under"), UNDER, ids=[f"{name}-{under[-1]}" for name, under in UNDER])
def test_a_trust_region_replaces_the_one_below_it(name: str, under: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As parsed by the command line, nothing of the other's settings stays."""
    chosen = printed(capsys, *under, f"trust_region/{name}")
    assert built(chosen) == built(read(f"trust_region/{name}"))
    assert contains(chosen, read(f"trust_region/{name}"))
    assert contains(chosen["data"]["plan"], read(under[-1])["data"]["plan"])


@pytest.mark.parametrize("name", PAPER)
def test_paper_configs_are_the_papers_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, samples, updates, longest, delta, delta_b, adaptive, stop = TABLE_3[name]
    whole = printed(capsys, "base", f"paper/{name}")
    assert whole["trainer"]["max_epochs"] == stop
    assert contains(whole["data"]["plan"], {"prompts": prompts, "samples": samples, "updates": updates})
    assert prompts // updates == 32
    sampled = {"max_tokens": longest, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    assert contains(whole["data"]["sampling"], sampled)
    model = whole["model"]
    assert model["policy"]["path"].lower().split("/")[1].replace("-", "_") == name
    assert model["policy"]["gradient_checkpointing"] is True, "what base.yaml says of the policy stays"
    assert (model["optimizer"]["class_path"], model["optimizer"]["init_args"]["lr"]) == ("torch.optim.AdamW", 1e-6)
    assert model["reference_kl"] is None
    region = model["trust_region"]
    assert region["class_path"] == "cppo_lightning.trust_regions.CPPO"
    expected = {"delta": delta, "delta_b": delta_b, "adaptive": adaptive, "w_min": 0.8, "ceiling": 2.0, "max_ratio": None}
    assert contains(region["init_args"], expected)
    assert region["init_args"]["divergence"]["init_args"] == {"k": 20}
    assert whole["data"]["template"]["chat"] is (name == "qwen3_1.7b")
    assert whole["data"]["template"]["text"] == read("base")["data"]["template"]["text"]
    assert contains(whole, read(f"paper/{name}"))


def test_ablations_change_what_they_are_named_for() -> None:
    changes = {
        "cppo_paper": {},
        "cppo_fixed": {"delta_b": 0.015, "adaptive": False},
        "cppo_binary": {"divergence": "BinaryTV"},
        "cppo_unirl": {"divergence": "BinaryTV"},
        "cppo_verl": {"divergence": "BinaryTV", "ceiling": 5.0, "max_ratio": 20.0, "horizon": 8192},
        "cppo_kl": {"divergence": "TopKKL", "delta": 0.1, "delta_b": 0.002},
        "cppo_binary_kl": {"divergence": "BinaryKL", "delta": 0.1, "delta_b": 0.002},
        "cppo_no_position_weight": {"w_min": 1.0},
        "cppo_no_budget": {"delta_b": None, "adaptive": False},
        "cppo_shuffled": {"seed": 0},
        "cppo_soft": {},
        "cppo_delta_b_0.03": {"delta_b": 0.03, "adaptive": False},
        "cppo_w_min_0.6": {"w_min": 0.6},
    }
    classes = {"cppo_verl": "FixedHorizonCPPO", "cppo_shuffled": "ShuffledCPPO", "cppo_soft": "SoftCPPO"}
    assert set(changes) | {"cppo"} == {name for name in TRUST_REGIONS if name.startswith("cppo")}
    main_row = vars(built(read("trust_region/cppo")))
    for name, expected in changes.items():
        region = built(read(f"trust_region/{name}"))
        changed = {key: value for key, value in vars(region).items() if key not in main_row or value != main_row[key]}
        if "divergence" in changed:
            changed["divergence"] = type(changed["divergence"]).__name__
        assert changed == expected, name
        assert type(region).__name__ == classes.get(name, "CPPO")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUST_REGIONS)
def test_debug_trains_two_rollouts_under_it(
    name: str, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which the command line adds the folder
    configs = [f"--config={CONFIGS}/debug.yaml", f"--config={CONFIGS}/trust_region/{name}.yaml"]
    main(["fit", *configs, "--trainer.max_epochs=2", f"--model.policy.path={tiny_model_path}"])
    (folder,) = tmp_path.glob("runs/debug/*")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert [event.step for event in scalars["train/loss"]] == [0, 1, 2, 3], "two updates on each of two rollouts"
    assert {tag for tag, found in scalars.items() if not all(math.isfinite(event.value) for event in found)} == set()
    assert any(event.value > 0 for event in scalars["train/grad_norm"])
    region = built(read(f"trust_region/{name}"))
    has_budget = getattr(region, "delta_b", None) is not None
    assert any(tag.startswith("budget/") for tag in scalars) is has_budget
