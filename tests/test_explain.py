"""Callback Explain: each rule speaks of what it is meant for, once, and is silent on a run that goes well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from cppo_lightning.callbacks import (
    BudgetExhaustion,
    Divergence,
    Explain,
    MaskRate,
    Mismatch,
    RolloutMetrics,
    RolloutProgress,
)
from cppo_lightning.callbacks.explain import setting
from cppo_lightning.callbacks.explanations import (
    RULES,
    CutOff,
    EarlyExhaustion,
    Explanation,
    LargeMismatch,
    Rule,
    Seen,
    ZeroLoss,
)
from cppo_lightning.divergences import TopKTV
from cppo_lightning.errors import ConfigError
from cppo_lightning.metrics import log_metrics
from cppo_lightning.rollout import RolloutPlan, Sampling
from cppo_lightning.trust_regions import CPPO, PPOClip
from cppo_lightning.verifiers import Format
from tests.callback_rig import Data, Module, events, trainer
from tests.test_callbacks import OUTCOMES
from tests.test_callbacks_progress import Terminal
from tests.test_fit import make_data, make_module, make_trainer

# metrics that are logged together, of a run that goes well: SmolLM2-135M on one-digit sums (configs/quickstart.yaml), rounded
ROLLOUT = {
    "rollout/reward": 0.6,
    "rollout/accuracy": 0.6,
    "rollout/truncated_share": 0.05,
    "rollout/response_length": 6.0,
    "rollout/zero_spread_share": 0.25,
    "rollout/verdict/unparseable": 0.0,
    "rollout/verdict/timed_out": 0.0,
    "rollout/verdict/failed": 0.0,
}
TRAIN = {"train/loss": 0.31, "train/grad_norm": 4.5, "train/entropy": 1.7, "train/learning_rate": 1e-5}
REGION = {"trust_region/divergence_mean": 0.02, "trust_region/divergence_max": 0.2}
MISMATCH = {"mismatch/divergence_mean": 3e-6, "mismatch/budget_rate": 2e-4, "mismatch/threshold_spent_mean": 2e-5}
BUDGET = {
    "budget/exhausted_share": 0.1,
    "budget/first_exhausted": 0.4,
    "budget/delta_b": 0.015,
    "budget/spent_mean": 0.4,
}
MASK = {"mask/rate": 0.03, "mask/toward": 0.6}
WELL = (ROLLOUT, MISMATCH, TRAIN, REGION, BUDGET, MASK)


class Run:
    """A trainer as far as metrics go; ``said`` is what was printed."""

    def __init__(self, explain: Explain, **model: Any) -> None:
        self.said: list[str] = []
        data = SimpleNamespace(sampling=Sampling(max_tokens=24), plan=RolloutPlan(8, 8, 2), rollout=SimpleNamespace(version=0))
        module = SimpleNamespace(print=self.said.append, trust_region=CPPO(delta_b=0.015), **model)
        self.trainer: Any = SimpleNamespace(
            callbacks=[explain],
            callback_metrics={},
            loggers=[],
            is_global_zero=True,
            global_step=0,
            lightning_module=module,
            datamodule=data,
        )

    def log(self, *groups: Mapping[str, float], step: int = 3) -> list[str]:
        """Log each group of metrics by itself; returns the names of the rules that spoke."""
        before = len(self.said)
        for metrics in groups:
            log_metrics(self.trainer, metrics, step)
        return [text.split("Explain: ")[1].split(",")[0] for text in self.said[before:]]


# rule, the metrics that make it speak (beside a run that goes well), values just short of that, and what it must say
CASES: dict[str, tuple[dict[str, float], dict[str, float], list[str]]] = {
    "equal_rewards": (
        {"rollout/zero_spread_share": 0.8},
        {"rollout/zero_spread_share": 0.79},
        ["80% of a rollout's groups", "60% are right", "data.plan.max_refills: 3"],
    ),
    "cut_off": (
        {"rollout/truncated_share": 0.25, "rollout/response_length": 20.0},
        {"rollout/truncated_share": 0.24},
        ["25% of the responses", "mean length is 20 tokens and the limit 24", "`data.sampling.max_tokens: 48` (now 24)"],
    ),
    "unparseable": (
        {"rollout/verdict/unparseable": 0.3},
        {"rollout/verdict/unparseable": 0.29},
        ["no answer in 30%", "`data.sampling.max_tokens: 48` (now 24) if they are cut off"],
    ),
    "verifier_failures": (
        {"rollout/verdict/timed_out": 0.01, "rollout/verdict/failed": 0.01},
        {"rollout/verdict/timed_out": 0.019},
        ["1.0% of the responses had no verdict", "deadline: 20"],
    ),
    "low_entropy": (
        {"train/entropy": 0.25},
        {"train/entropy": 0.26},
        ["0.25 nats per token, 15% of the 1.7", "reward of 0.60", "lr: 5e-06` (now 1e-05)"],
    ),
    "large_divergence": (
        {"trust_region/divergence_mean": 0.046},
        {"trust_region/divergence_mean": 0.044},
        ["31% of the trust region's delta = 0.15", "numerics alone make 3e-06", "`data.plan.updates: 1` (now 2)"],
    ),
    "large_mismatch": (
        {"mismatch/budget_rate": 0.75, "mismatch/threshold_spent_mean": 0.09, "mismatch/divergence_mean": 0.0131},
        {"mismatch/budget_rate": 0.24},
        ["75% of its prefix budget delta_b", "noise: 0.013`"],
    ),
    "early_exhaustion": (
        {"budget/exhausted_share": 0.6, "budget/first_exhausted": 0.2, "budget/spent_mean": 1.7},
        {"budget/exhausted_share": 0.6, "budget/first_exhausted": 0.26},
        ["60% of the responses", "20% into", "a response spends 1.7 times what it may", "delta_b: 0.0225` (now 0.015)"],
    ),
    "mostly_dropped": (
        {"mask/rate": 0.33},
        {"mask/rate": 0.31},
        ["dropped 33% of the tokens", "40% would move away"],
    ),
}


def changed(values: Mapping[str, float]) -> list[dict[str, float]]:
    """The metrics of the good run with some of them replaced."""
    assert values.keys() <= {tag for group in WELL for tag in group}
    return [{**group, **{tag: value for tag, value in values.items() if tag in group}} for group in WELL]


def test_a_run_that_goes_well_hears_nothing() -> None:
    assert Run(Explain()).log(*WELL) == []


def test_every_rule_has_a_case() -> None:
    assert CASES.keys() | {"zero_loss"} == RULES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks_when_it_should_and_only_once(name: str) -> None:
    speaks, silent, words = CASES[name]
    run = Run(Explain())
    run.log(*WELL, step=2)
    assert run.log(*changed(silent)) == []
    assert run.log(*changed(speaks)) == [name]
    said = " ".join(run.said[0].split())
    assert said.startswith(f"Explain: {name}, at step 3 saw ")
    assert [word for word in words if word not in said] == []
    assert " means " in said
    assert " try " in said
    assert run.log(*changed(speaks)) == [], "once"


@pytest.mark.parametrize("name", CASES)
def test_of_what_is_no_number_no_rule_speaks(name: str) -> None:
    speaks, _, _ = CASES[name]
    run = Run(Explain())
    assert run.log(*changed(dict.fromkeys(speaks, float("nan"))), step=1) == []
    assert run.log(*WELL, step=2) == []
    assert run.log(*changed(speaks)) == [name], "it has not spoken yet, and compares with the first number"


@pytest.mark.parametrize(
    ("accuracy", "cut_off", "unparseable", "words"),
    [
        (1.0, 0.0, 0.0, "All right: the problems are too easy"),
        (0.5, 0.0, 0.0, "Some are all right and the others all wrong"),
        (0.0, 1.0, 1.0, "because answers are cut off"),
        (0.0, 0.0, 1.0, "because no answer can be read"),
        (0.0, 0.1, 0.1, "All wrong: the problems are too hard"),
    ],
)
def test_equal_rewards_have_different_reasons(accuracy: float, cut_off: float, unparseable: float, words: str) -> None:
    shares = {"rollout/accuracy": accuracy, "rollout/truncated_share": cut_off, "rollout/verdict/unparseable": unparseable}
    run = Run(Explain({"cut_off": None, "unparseable": None}))
    assert run.log({**ROLLOUT, **shares, "rollout/zero_spread_share": 1.0}) == ["equal_rewards"]
    assert words in " ".join(run.said[0].split())


def test_a_loss_of_0_is_explained_where_it_is_by_design() -> None:
    zero = {**TRAIN, "train/loss": -7.5e-8}
    run = Run(Explain())
    assert run.log(zero, step=1) == [], "the rollout's second update: the policy is not the one that sampled"
    assert run.log({**zero, "train/grad_norm": 0.0}, step=0) == [], "no gradient is no design"
    assert run.log({**zero, "train/loss": 2e-4}, step=0) == []
    assert run.log(zero, step=0) == ["zero_loss"]
    said = " ".join(run.said[0].split())
    assert "`train/loss` is -7e-08" in said
    assert "nothing is broken" in said


def test_a_trust_region_without_a_threshold_has_no_usual_range() -> None:
    run = Run(Explain())
    run.trainer.lightning_module.trust_region = PPOClip()
    assert run.log(*changed({"trust_region/divergence_mean": 0.9})) == []


def test_what_is_not_known_is_left_out_of_the_advice() -> None:
    seen = Seen(0, {}, {}, lambda key: None)
    assert seen.scaled("data.sampling.max_tokens", 2) == "a larger `data.sampling.max_tokens`"
    assert seen.gentler() == "a smaller learning rate, `model.optimizer.init_args.lr`"


@pytest.mark.parametrize(("updates", "fewer"), [(2, 1), (3, 1), (8, 4)])
def test_fewer_updates_are_a_number_that_the_prompts_divide_into(updates: int, fewer: int) -> None:
    seen = Seen(0, {}, {}, {"data.plan.updates": updates}.get)
    assert seen.gentler().endswith(f"`data.plan.updates: {fewer}` (now {updates})")
    assert updates % fewer == 0
    assert "updates" not in Seen(0, {}, {}, {"data.plan.updates": 1}.get).gentler()


def test_what_is_to_be_copied_stands_on_one_line() -> None:
    run = Run(Explain())
    run.log(*changed({"rollout/verdict/failed": 0.5, "trust_region/divergence_mean": 0.1, "mask/rate": 0.4}))
    assert len(run.said) == 3
    for said in run.said:
        assert [line for line in said.split("\n") if line.count("`") % 2] == []
        assert all(len(line) <= 120 for line in said.split("\n") if "VerifierPool" not in line)


@pytest.mark.parametrize("columns", [60, 300])
def test_lines_fit_a_terminal_that_is_narrower(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    run = Run(Explain())
    run.log(*changed({"mask/rate": 0.4}))
    widths = [len(line) for line in run.said[0].split("\n")]
    assert min(columns, 120) - 20 < max(widths) <= min(columns, 120)


def test_settings_are_found_by_their_yaml_key() -> None:
    run = Run(Explain()).trainer
    assert setting(run, "data.plan.updates") == 2
    assert setting(run, "model.trust_region.init_args.delta_b") == 0.015
    assert setting(run, "model.trust_region.init_args.nothing.there") is None
    assert setting(run, "optimizer.lr") is None


def test_a_resumed_run_repeats_nothing_and_keeps_its_first_entropy() -> None:
    first = Explain()
    run = Run(first)
    assert run.log(TRAIN, changed({"rollout/truncated_share": 0.5})[0]) == ["cut_off"]
    resumed = Explain()
    resumed.load_state_dict(first.state_dict())
    again = Run(resumed)
    assert again.log(changed({"rollout/truncated_share": 0.5})[0]) == []
    assert again.log({**TRAIN, "train/entropy": 0.2}) == ["low_entropy"], "0.2 is 12 % of the first run's 1.7"
    assert Run(Explain()).log({**TRAIN, "train/entropy": 0.2}) == []


def test_ranks_other_than_0_say_nothing() -> None:
    run = Run(Explain())
    run.trainer.is_global_zero = False
    assert run.log(*changed({"rollout/truncated_share": 0.5})) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CutOff(share=0), r"CutOff.share must be above 0 and at most 1 \(usual: 0.25\), got 0"),
        (lambda: EarlyExhaustion(place=1.5), r"EarlyExhaustion.place must be above 0 and at most 1 \(usual: 0.25\), got 1.5"),
        (lambda: LargeMismatch(share=float("nan")), "LargeMismatch.share must be"),
        (lambda: ZeroLoss(largest=0), "ZeroLoss.largest must be above 0"),
    ],
)
def test_thresholds_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@dataclass(frozen=True)
class LowReward(Rule):
    """A rule of a user's own."""

    watches: ClassVar = ("rollout/reward",)
    reward: float = 0.7

    def __call__(self, seen: Seen) -> Explanation | None:
        found = seen.latest["rollout/reward"]
        return Explanation(f"reward {found}", "it is low", "`trainer.max_epochs: 9`") if found < self.reward else None


def test_rules_can_be_added_replaced_and_taken_away_in_yaml() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(parser_mode="omegaconf")
    parser.add_subclass_arguments(Explain, "callback")
    package = "cppo_lightning.callbacks.explanations"
    rules = {
        "cut_off": {"class_path": f"{package}.CutOff", "init_args": {"share": 0.01}},
        "unparseable": None,
        "low_reward": {"class_path": f"{__name__}.LowReward", "init_args": {"reward": 0.65}},
    }
    config = {"callback": {"class_path": "cppo_lightning.callbacks.Explain", "init_args": {"rules": rules}}}
    explain = parser.instantiate(parser.parse_object(config))["callback"]
    assert explain.rules.keys() == RULES.keys() - {"unparseable"} | {"low_reward"}
    assert Run(explain).log(*changed({"rollout/verdict/unparseable": 1.0})) == ["cut_off", "low_reward"]


def test_it_is_said_above_the_progress_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    callbacks = [RolloutMetrics(), Explain(), RolloutProgress()]
    trainer(tmp_path, callbacks).fit(Module(), datamodule=Data(OUTCOMES))  # the rig's last response of four is cut off
    text = terminal.text()
    assert text.count("Explain: cut_off, at step 0") == 1
    before, after = text.split("Explain: cut_off")
    assert before.endswith("\x1b[2K"), "the line was erased before"
    assert "\x1b[" not in after.split("sampling.max_tokens")[0], "and drawn again after it"
    assert "rollout 2/2" in after


def test_a_real_run_explains_itself(tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of 1e-2 against a budget of nothing, and responses of eight random bytes: all of these are true of it."""
    explain, region = Explain(), CPPO(TopKTV(5), delta=0.02, delta_b=0.0, adaptive=False)
    data, logger = make_data(tiny_model_path), TensorBoardLogger(tmp_path, name="", version="run")
    callbacks = [explain, RolloutMetrics(), MaskRate(), BudgetExhaustion(), Divergence(), Mismatch()]
    try:
        module = make_module(tiny_model_path, trust_region=region)
        make_trainer(tmp_path, callbacks, rollouts=2, logger=logger).fit(module, datamodule=data)
    finally:
        data.close()
    assert explain.told == {"cut_off", "zero_loss", "large_divergence", "early_exhaustion", "mostly_dropped"}
    printed = capsys.readouterr().out
    found = events(tmp_path)
    for name in explain.told:
        assert printed.count(f"Explain: {name}, at step ") == 1
        (event,) = found.Tensors(f"explain/{name}/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        assert [line.split(":")[0] for line in text.split("\n\n")] == ["**saw**", "**means**", "**try**"]
    assert found.Tensors("explain/zero_loss/text_summary")[0].step == 0
    (event,) = found.Tensors("explain/early_exhaustion/text_summary")
    spent = {e.step: e.value for e in found.Scalars("budget/spent_mean")}[event.step]
    said = f"a response spends {spent:.3g} times what it may"
    assert said in event.tensor_proto.string_val[0].decode(), "of that step, and not of the one before"


def test_a_real_run_of_equal_rewards(tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tiny_model_path, verifier=Format(""))  # anything is right
    callbacks: list[Any] = [RolloutMetrics(), Explain({"cut_off": None})]
    try:
        with pytest.warns(UserWarning, match="no step is taken"):
            make_trainer(tmp_path, callbacks, rollouts=2).fit(make_module(tiny_model_path), datamodule=data)
    finally:
        data.close()
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("Explain: ") == 1
    assert "equal_rewards, at step 0 saw in 100% of a rollout's groups" in printed
    assert "All right: the problems are too easy" in printed
