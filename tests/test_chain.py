"""Chains of operations: the problems against a slow evaluation, hostile answers, the small model, and a run of two rollouts."""

from __future__ import annotations

import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoTokenizer

from cppo_lightning import chain_model
from cppo_lightning.chain_model import Pretraining, _Batches, _loss, chain_tokenizer
from cppo_lightning.cli import main
from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts import BadRows, ChainPrompts, LoadCounts
from cppo_lightning.prompts.chain_prompts import draw_chain, running_values
from cppo_lightning.prompts.holdout import Split, in_split
from cppo_lightning.verifiers import ChainVerifier, Outcome, Problem, VerifierPool
from tests.test_presets import CONFIGS, contains, printed, read

SEEDS = st.integers(0, 2**32)
FEW = 2  # operations of the model that the tests train


@pytest.fixture(scope="module")
def chain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The architecture of ``configs/chain`` on chains of two operations, stopped before it can do them."""
    return Pretraining(str(tmp_path_factory.mktemp("models") / "chain-2"), FEW, slip=0.05, steps=40, learning_rate=1e-2).run()


def oracle(chain: str) -> list[int]:
    """The values by Python's own arithmetic on the whole chain so far, in brackets; nothing is reduced before its end."""
    body, values = chain.partition("=")[0], []
    for end in range(3, len(body) + 1, 2):
        formula = body[0]
        for place in range(1, end, 2):
            formula = f"({formula}{body[place : place + 2]})"
        values.append(eval(formula) % 10)
    return values


# --- the problems ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), SEEDS)
def test_running_values_are_those_of_pythons_integers(operations: int, seed: int) -> None:
    chain = draw_chain(operations, random.Random(seed))
    assert len(chain) == 2 * operations + 4
    assert running_values(chain) == ",".join(map(str, oracle(chain)))


@settings(deadline=None)
@given(st.integers(2, 12), SEEDS, st.data())
def test_a_wrong_value_is_carried_to_the_end(operations: int, seed: int, data: st.DataObject) -> None:
    """Whichever operations follow: none of them makes two values one."""
    chain = draw_chain(operations, random.Random(seed))
    wrong, off, seen = data.draw(st.integers(0, operations - 1)), data.draw(st.integers(1, 9)), 0

    def slip(value: int) -> int:
        nonlocal seen
        seen += 1
        return (value + off) % 10 if seen == wrong + 1 else value

    right, slipped = running_values(chain).split(","), running_values(chain, slip).split(",")
    assert [a != b for a, b in zip(right, slipped, strict=True)] == [i >= wrong for i in range(operations)]


def test_chains_are_distinct_and_fewer_are_the_first_of_more() -> None:
    rows = BadRows()
    problems = ChainPrompts(3, 200, seed=4).load(rows)
    assert rows.counts == LoadCounts(rows=200)
    assert len({problem.messages[0]["content"] for problem in problems}) == len({problem.id for problem in problems}) == 200
    assert problems[:50] == ChainPrompts(3, 50, seed=4).load()
    assert problems[:50] != ChainPrompts(3, 50, seed=5).load()


def test_training_and_heldout_chains_are_two_parts_of_all() -> None:
    """Every chain of one operation is found, in one part or the other whatever the seed, and no other."""
    operations = [f"{sign}{operand}" for sign in "+-" for operand in range(10)] + [f"*{factor}" for factor in (1, 3, 7, 9)]
    everything = {f"{start}{operation}={start}," for start in range(10) for operation in operations}
    heldout = {chain for chain in everything if in_split(chain, "heldout", 0.3)}
    assert 0.2 < len(heldout) / len(everything) < 0.4
    parts: tuple[tuple[set[str], Split], ...] = ((heldout, "heldout"), (everything - heldout, "train"))
    for seed, (part, split) in enumerate(parts):
        assert set(ChainPrompts(1, len(part), seed, 0.3, split).chains()) == part
        with pytest.raises(ConfigError, match=rf"no more than {len(part)} chains of operations = 1 in the split '{split}'"):
            ChainPrompts(1, len(part) + 1, seed, 0.3, split).chains()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"operations": 0}, r"ChainPrompts\.operations must be at least 1, got 0"),
        ({"operations": 2, "count": 0}, r"ChainPrompts\.count must be at least 1, got 0"),
        ({"operations": 2, "heldout_share": 1.0}, r"ChainPrompts\.heldout_share must be in \[0, 1\), got 1.0"),
        ({"operations": 2, "split": "test"}, r"ChainPrompts\.split must be 'train' or 'heldout', got 'test'"),
        ({"operations": 2, "heldout_share": 0.0, "split": "heldout"}, r"ChainPrompts\.split is 'heldout', which is empty"),
    ],
)
def test_bad_settings_of_the_prompts(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChainPrompts(**bad)


# --- the verdicts ------------------------------------------------------------------------------------------------------------

PROBLEM = Problem("chain", ({"role": "user", "content": "7+5*3-9=7,"},), "2,6,7")


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        ("2,6,7", Outcome.CORRECT),
        ("\n 2,6,7 ", Outcome.CORRECT),
        ("9,9,7", Outcome.CORRECT),  # the end alone counts
        ("2,6,8", Outcome.WRONG),
        ("7,6,2", Outcome.WRONG),
        *[
            (response, Outcome.UNPARSEABLE)
            for response in (
                *("", "7", "6,7", "2,6,7,", ",6,7", "2,6,7,7", "2,6,77", "22,6,7", "2 6 7", "2, 6, 7", "2,6,-7", "2,6,7="),
                *("2,6,7\n2,6,7", "a,6,7", "2,6,7</s>", "2,6,\u0667", "2,6,\uff17", "2,6,7\0", "2,,6,7", "2;6;7", "2,6,7 or 8"),
                "7" * 100_000,
                "2," * 100_000,
            )
        ],
    ],
)
def test_verdicts(response: str, outcome: Outcome) -> None:
    verdict = ChainVerifier()(PROBLEM, response)
    assert (verdict.outcome, verdict.reward) == (outcome, float(outcome is Outcome.CORRECT))
    assert verdict.extracted == (None if outcome is Outcome.UNPARSEABLE else response.strip()[-1])


@settings(deadline=None)
@given(st.integers(1, 6), SEEDS, st.text(alphabet="0123456789,", max_size=12))
def test_a_response_is_right_if_it_has_the_form_and_the_end(operations: int, seed: int, response: str) -> None:
    chain = draw_chain(operations, random.Random(seed))
    problem = Problem("chain", (), running_values(chain))
    values = response.split(",")
    right = len(values) == operations and all(len(v) == 1 for v in values) and int(values[-1]) == oracle(chain)[-1]
    assert (ChainVerifier()(problem, response).outcome is Outcome.CORRECT) is right


def test_answers_are_checked_and_judged_in_the_pool() -> None:
    problems = ChainPrompts(5, 20, seed=3).load()
    foreign = Problem("other", (), "17")
    with VerifierPool(ChainVerifier()) as pool:
        verdicts = pool.check([*problems, foreign])
        judged = [pool.submit(problem, problem.answer).result() for problem in problems]
    assert [verdict.outcome for verdict in verdicts] == [Outcome.CORRECT] * 20 + [Outcome.FAILED]
    assert "not the running values of a chain" in verdicts[-1].detail
    assert {verdict.reward for verdict in judged} == {1.0}


# --- the model ---------------------------------------------------------------------------------------------------------------


def test_a_token_is_a_character_and_the_vocabulary_has_room_for_top_20(chain_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chain_folder)
    text = "0123456789+-*=,"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(set(ids)) == len(text)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer(" x")["input_ids"] == [tokenizer.unk_token_id] * 2
    config = AutoConfig.from_pretrained(chain_folder)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (3, 128, len(tokenizer))
    assert len(tokenizer) == 32


def test_traces_slip_as_often_as_they_are_told_to() -> None:
    """9 of 10 random digits are wrong, and the chain goes on with them; binomial, 5 sigma."""
    pretraining = Pretraining("unused", 16, slip=0.2, steps=100, batch=4)
    traces = list(pretraining.traces())
    assert len({chain for chain, _ in traces}) == len(traces) == 400
    assert not any(in_split(chain, "heldout", 0.1) for chain, _ in traces)
    assert all(written == running_values(chain) for chain, written in traces[:200]), "the first half has none"
    wrong = total = 0
    for chain, written in traces[200:]:
        values = [int(chain[0]), *map(int, written.split(","))]
        for i, value in enumerate(values[1:]):
            total += 1
            wrong += value != oracle(f"{values[i]}{chain[1 + 2 * i : 3 + 2 * i]}=")[0]
    expected = total * 0.2 * 0.9
    assert abs(wrong - expected) < 5 * (expected * 0.82) ** 0.5
    assert [values for _, values in replace(pretraining, slip=0.0).traces()] == [running_values(chain) for chain, _ in traces]


@pytest.mark.parametrize("clean_steps", [None, 2])
def test_clean_chains_are_cut_short_in_whole_batches(clean_steps: int | None) -> None:
    steps = 5 if clean_steps is None else 8  # half of 5, rounded down
    pretraining = Pretraining("unused", 8, slip=0.5, steps=steps, batch=3, short=2, clean_steps=clean_steps)
    (cut, whole), tokenizer = [list(replace(pretraining, short=short).traces()) for short in (2, None)], chain_tokenizer()
    assert cut[6:] == whole[6:]
    for (chain, written), (longer, values) in zip(cut[:6], whole[:6], strict=True):
        assert (chain, written) == (f"{longer[:5]}={longer[0]},", values[:3])
        assert values == running_values(longer)
    shapes = [[tuple(part.shape) for part in batch] for batch in _Batches(pretraining, tokenizer)]
    assert shapes == [[(3, 12)] * 3] * 2 + [[(3, 36)] * 3] * (steps - 2)
    assert any(values != running_values(chain) for chain, values in cut[6:])


@pytest.mark.parametrize("clean_steps", [0, 4])
def test_all_steps_or_none_may_be_clean(clean_steps: int) -> None:
    settings = Pretraining("unused", 8, slip=0.9, steps=4, batch=3, short=2, clean_steps=clean_steps)
    slipped = [values != running_values(chain) for chain, values in settings.traces()]
    assert all(slipped) if clean_steps == 0 else not any(slipped)


def test_a_short_chain_is_read_as_if_what_it_lacks_were_there_and_hidden() -> None:
    """Answers are as far behind their operations as in a whole chain; the oracle has padding in the gap, under a mask."""
    settings, tokenizer = Pretraining("unused", 8, slip=0.0, steps=2, batch=3, short=3), chain_tokenizer()
    torch.manual_seed(0)
    model = chain_model.chain_model(tokenizer, settings.operations)
    ids, labels, positions = next(iter(_Batches(settings, tokenizer)))
    padded, there = torch.zeros(3, 26, dtype=torch.long), torch.ones(3, 26, dtype=torch.long)
    padded[:, :7], padded[:, 17:], there[:, 7:17] = ids[:, :7], ids[:, 7:], 0
    logits = model(input_ids=padded, attention_mask=there).logits.log_softmax(-1)
    answers = [tokenizer.decode(row[20:-1]) for row in padded]
    assert answers == [values for _, values in list(settings.traces())[:3]]
    expected = -logits[:, 19:-1].gather(-1, padded[:, 20:, None]).mean()
    torch.testing.assert_close(_loss(model, ids, labels, positions), expected, atol=1e-5, rtol=0)
    together = _loss(model, ids, labels, torch.arange(16).expand_as(ids))
    assert abs(together - expected) > 1e-3, "the gap matters"


def test_pretraining_gives_the_same_weights_again(chain_folder: Path, tmp_path: Path) -> None:
    given_settings = yaml.safe_load((CONFIGS / "chain" / "pretrain_16.yaml").read_text()) | {"operations": FEW, "steps": 3}
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    folders = [tmp_path / name for name in ("one", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        Pretraining(**given_settings | {"folder": str(folder), "seed": seed}).run()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    one, again, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "proj" in name)
    written = (chain_folder / "model.safetensors").stat().st_mtime_ns
    assert Pretraining(str(chain_folder), FEW, slip=0.0, steps=1).run() == chain_folder
    assert (chain_folder / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"operations": 0}, r"Pretraining\.operations must be at least 1, got 0"),
        ({"threads": 0}, r"Pretraining\.threads must be at least 1, got 0"),
        ({"short": 3}, r"Pretraining\.short must be from 1 to operations = 2, got 3"),
        ({"short": 0}, r"Pretraining\.short must be from 1 to operations = 2, got 0"),
        ({"clean_steps": 2}, r"Pretraining\.clean_steps must be from 0 to steps = 1, got 2"),
        ({"clean_steps": -1}, r"Pretraining\.clean_steps must be from 0 to steps = 1, got -1"),
        ({"slip": 1.0}, r"Pretraining\.slip must be in \[0, 1\), got 1.0"),
        ({"learning_rate": 0.0}, r"Pretraining\.learning_rate must be above 0, got 0.0"),
    ],
)
def test_bad_settings_of_pretraining(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pretraining(**{"folder": "unused", "operations": 2, "slip": 0.1, "steps": 1} | bad)


def test_pretraining_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    config = [
        "--config",
        f"{CONFIGS}/chain/pretrain_16.yaml",
        "--folder",
        str(folder),
        "--operations",
        str(FEW),
        "--steps",
        "2",
    ]
    assert chain_model.main(config) == 0
    assert re.search(r"solves 0\.\d+ of 512 held-out chains of 2 operations", capsys.readouterr().out)
    (folder / "config.json").unlink()
    assert chain_model.main(config) == 2
    assert "is no complete model" in capsys.readouterr().err


# --- training ----------------------------------------------------------------------------------------------------------------


def in_numbers(operations: int, name: str = "chain_16") -> str:
    """A config of ``configs/chain`` for chains of 16 operations, rewritten for chains of another length."""
    text = (CONFIGS / "chain" / f"{name}.yaml").read_text()
    for found, wanted in (
        (r"\b(chain[-_]|pretrain_|chains of |operations: )16\b", rf"\g<1>{operations}"),
        (r"\bmax_tokens: 32\b", f"max_tokens: {2 * operations}"),
    ):
        text = re.sub(found, wanted, text)
    return text


@pytest.mark.parametrize("operations", [64, 128])
def test_configs_for_longer_chains_differ_in_what_length_changes(operations: int) -> None:
    """As many slips in a chain, and clean steps of chains that are no longer than those of 16, of which 128 need more."""
    # runs of longer answers are shorter, and evaluated more often
    often = in_numbers(operations).replace("every_n_rollouts: 10", f"every_n_rollouts: {3 if operations == 64 else 2}")
    assert read(f"chain/chain_{operations}") == yaml.safe_load(often)
    start, shortest = read(f"chain/pretrain_{operations}"), read("chain/pretrain_16")
    slip = shortest["slip"] * 16 / operations
    longer = {"folder": f"models/chain-{operations}", "operations": operations, "slip": slip, "short": 16}
    assert start == shortest | longer | ({"steps": 3200, "clean_steps": 2400} if operations == 128 else {})
    Pretraining(**start)


def test_the_config_is_the_papers_comparison_in_miniature(capsys: pytest.CaptureFixture[str]) -> None:
    run, pretraining = printed(capsys, "chain/chain_16"), read("chain/pretrain_16")
    assert run["model"]["policy"]["path"] == pretraining["folder"]
    data = run["data"]
    assert contains(data["plan"], {"prompts": 32, "samples": 8, "updates": 8, "passes": 2, "max_staleness": 0})
    (evaluation,) = [c["init_args"] for c in run["trainer"]["callbacks"] if c["class_path"].endswith("EvalAccuracy")]
    assert evaluation["datasets"] == {"heldout_chains": data["evaluation"]["prompts"]}
    train, heldout = (source["init_args"] for source in (data["prompts"], data["evaluation"]["prompts"]))
    assert train["count"] == run["trainer"]["max_epochs"] * data["plan"]["prompts"], "no problem comes twice"
    assert train["operations"] == heldout["operations"] == pretraining["operations"]
    assert (train["split"], heldout["split"], train["heldout_share"]) == ("train", "heldout", heldout["heldout_share"])
    assert contains(run["model"]["trust_region"], read("trust_region/cppo")["model"]["trust_region"])
    assert run["model"]["optimizer"]["init_args"]["betas"] == [0.9, 0.95]


def test_two_rollouts_of_chains(chain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of two operations, which the model gets right now and then, from the command line: 16 steps on each rollout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("chain_2.yaml").write_text(re.sub("count: [0-9]+", "count: 64", in_numbers(FEW)))
    main(["fit", "--config=chain_2.yaml", "--trainer.max_epochs=2", f"--model.policy.path={chain_folder}"])
    (folder,) = tmp_path.glob("runs/chain-2/*")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(32)), "8 minibatches of each rollout, twice"
    assert [event.step for event in events.Scalars("eval/heldout_chains/avg@1")] == [0, 32]
    assert 0 < events.Scalars("rollout/reward")[0].value < 1
