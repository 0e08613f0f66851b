"""Which tokens of an answer to a chain a trust region pulls at: Python's arithmetic, and sums over the recorded rows."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from benchmarks.comparison import slips
from benchmarks.comparison.slips import Step, steps_of
from cppo_lightning.chain_model import Pretraining, chain_tokenizer
from cppo_lightning.cli import main
from cppo_lightning.errors import ConfigError
from tests.test_chain import FEW, in_numbers
from tests.test_presets import CONFIGS

B, S, A, R = Step.BEFORE, Step.SLIP, Step.BEHIND, Step.REST
RECORDER = ["--trainer.callbacks+=cppo_lightning.callbacks.RolloutRecorder", "--trainer.callbacks.dirpath=recorded"]


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        ("2,6,5", [B, R, B, R, B]),  # 7+5=2, 2*3=6, 6-1=5
        ("3,9,8", [S, R, A, R, A]),  # what follows is right from the wrong value
        ("3,6,5", [S, R, S, R, A]),  # a second slip, back to the right value
        ("2,7,5", [B, R, S, R, S]),
        ("2,6,5,1", [B, R, B, R, B, R, R]),  # too many
        ("2,,65", [B, R, R, R, S]),  # no digit: the next is compared with the last one that was written
        ("", []),
    ],
)
def test_what_each_step_is(answer: str, kinds: list[Step]) -> None:
    assert steps_of("7+5*3-1=7,", answer) == kinds


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rollouts of chains of two operations, under CPPO."""
    folder = tmp_path_factory.mktemp("slips")
    model = Pretraining(str(folder / "chain-2"), FEW, slip=0.05, steps=40, learning_rate=1e-2).run()
    (folder / "chain_2.yaml").write_text(re.sub("count: [0-9]+", "count: 64", in_numbers(FEW)))
    options = ["--trainer.max_epochs=2", f"--model.policy.path={model}", "--trainer.logger=false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        every = ["--trainer.callbacks.every_n_rollouts=1", "--trainer.callbacks.keep=null"]
        main(["fit", "--config=chain_2.yaml", *options, *RECORDER, *every])
    return folder / "recorded"


def kind(chain: str, written: list[str], place: int) -> Step:
    """Of the token at ``place``, from all that was written before it."""
    if place % 2 or place > 2 or not written[place].isdigit():
        return R
    start = next((int(c) for c in reversed(written[:place:2]) if c.isdigit()), int(chain[0]))
    right = eval(f"{start}{chain[1 + place : 3 + place]}") % 10 == int(written[place])
    return S if not right else A if any(kind(chain, written, earlier) is S for earlier in range(place)) else B


def test_pulls_are_sums_over_the_recorded_rows(recording: Path) -> None:
    found = slips.pulls(recording, [CONFIGS / "trust_region" / f"{name}.yaml" for name in ("none", "cppo")])
    names = chain_tokenizer().convert_ids_to_tokens(list(range(32)))
    tokens: Counter[tuple[bool, Step]]
    tokens, none, cppo = Counter(), Counter(), Counter()
    for row in pd.read_parquet(recording / "rollouts").to_dict("records"):
        if not row["advantage"]:
            continue
        chain = "".join(name for token in row["prompt_ids"] if len(name := names[token]) == 1)
        written = [names[token] for token in row["response_ids"]]
        written = [name if len(name) == 1 else "." for name in written]
        for place in range(len(written)):
            key = (row["advantage"] > 0, kind(chain, written, place))
            reach = abs(row["advantage"]) * (1 - math.exp(row["logp"][place]))
            tokens[key] += 1
            none[key] += reach * math.exp(row["logp"][place] - row["rollout_logp"][place])
            cppo[key] += reach * row["weight"][place]
    assert {key: pull.tokens for key, pull in found.items() if pull.tokens} == dict(tokens)
    assert len(tokens) >= 6, "slips, and what is before and behind them, among right and wrong answers"
    for name, sums in (("none", none), ("cppo", cppo)):
        assert {key: found[key].by_region[name] for key in tokens} == pytest.approx(dict(sums), rel=1e-5)


def test_the_table(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slips.main([str(recording), "--rollouts", "0"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[4:]] == list(slips.TABLE)
    assert sum(float(share.rstrip("%")) for share in rows[4][1:]) == pytest.approx(100, abs=0.3), "none pulls at all there is"
    assert slips.main([str(recording), "--rollouts", "7"]) == 2
    assert "has no such rollout" in capsys.readouterr().err


def test_what_would_be_no_table_is_refused(recording: Path, tmp_path: Path) -> None:
    """Two trust regions of one name, of which one would stand in both rows; and one that pulls at nothing."""
    other = tmp_path / "cppo.yaml"
    other.write_text((CONFIGS / "trust_region" / "none.yaml").read_text())
    with pytest.raises(ConfigError, match="'cppo' is the name of 2 files"):
        slips.pulls(recording, [CONFIGS / "trust_region" / "cppo.yaml", other])
    with pytest.raises(ConfigError, match="cppo pulls at no token"):
        slips.table({(up, step): slips.Pull() for up in (True, False) for step in Step}, ["cppo"])


def test_recordings_of_other_tasks_are_refused(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slips, "chain_tokenizer", lambda: SimpleNamespace(get_vocab=dict))
    with pytest.raises(ConfigError, match="whose prompts are chains"):
        slips.pulls(recording, [])
