"""Samples as readable text: what a reader sees of a run's dropped tokens, and that nothing a model writes passes for markup."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import AutoTokenizer

from cppo_lightning.batch import Gate
from cppo_lightning.callbacks import TextSamples
from cppo_lightning.callbacks.text_samples import as_markdown
from cppo_lightning.callbacks.token_marks import BRACKETS, Cause, bracketed, causes, counted, pieces
from cppo_lightning.divergences import TopKTV
from cppo_lightning.errors import ConfigError
from cppo_lightning.rollout.sampler import Sample
from cppo_lightning.trust_regions import CPPO, DPPO, TrustRegion
from cppo_lightning.verifiers.base import Outcome
from tests.callback_rig import Data, Module, events, rollout, stats_and_gate, trainer
from tests.test_callbacks import OUTCOMES, fit
from tests.test_fit import make_data, make_module, make_trainer

KEPT, THRESHOLD, BUDGET, OTHER = Cause
W = Outcome.WRONG


def texts(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """What TensorBoard would show: ``(step, text)`` by tag."""
    found = events(folder)
    return {
        tag.removesuffix("/text_summary"): [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
    }


def test_samples_reach_tensorboard_after_the_updates(tmp_path: Path) -> None:
    fit(tmp_path, [TextSamples(every_n_rollouts=2, count=3)], rollouts=3)
    found = texts(tmp_path)
    assert sorted(found) == ["samples/0", "samples/1", "samples/2"]
    assert [step for step, _ in found["samples/0"]] == [0, 4]
    text = found["samples/0"][0][1]
    assert "**correct**, reward 1, 1 tokens" in text
    assert "not trained on in this run" in text, "the rig's gates do not say whose they are"
    assert "    2 + 0?" in text


@pytest.mark.parametrize("key", ["every_n_rollouts", "count", "max_chars"])
def test_numbers_below_1_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"TextSamples.{key} must be at least 1, got 0"):
        TextSamples(**{key: 0})


def test_causes_by_hand() -> None:
    stats, gate = stats_and_gate()
    blank = [KEPT] * 5
    assert causes(stats, gate).tolist() == [[KEPT, KEPT, THRESHOLD, KEPT, BUDGET], [KEPT, KEPT, BUDGET, KEPT, KEPT], blank]
    assert causes(stats, Gate(gate.weight, gate.keep)).tolist() == [
        [KEPT, KEPT, OTHER, KEPT, OTHER],
        [KEPT, KEPT, OTHER, KEPT, KEPT],
        blank,
    ]


def test_counts_in_words() -> None:
    assert counted([KEPT, KEPT]) == "no token dropped"
    assert counted([OTHER]) == "1 of 1 tokens dropped, 1 by the trust region ⟨so⟩"
    text = "3 of 4 tokens dropped, 2 by the token threshold ⟦so⟧, 1 by the prefix budget ⟪so⟫"
    assert counted([KEPT, THRESHOLD, BUDGET, THRESHOLD]) == text


def test_brackets_that_a_model_writes_are_escaped() -> None:
    every = "".join(BRACKETS.values())
    assert bracketed([(KEPT, f"a{every}"), (THRESHOLD, "b⟧c")]) == (
        "a\\u27e6\\u27e7\\u27ea\\u27eb\\u27e8\\u27e9⟦b\\u27e7c⟧"
    )  # all three kinds, and one that would end a stretch


TEXT = "Let x = 3 · 4 = 12,\n\n  so the 答案是 42 🙂🙂 and naïve ≠ done. <|im_end|>"


@pytest.mark.parametrize("model", ["tiny_model_path", "smollm2_path"])
def test_pieces_are_the_text_wherever_it_is_cut(model: str, request: pytest.FixtureRequest) -> None:
    """Against one decoding of the whole text, with cuts at random places, inside characters of several tokens too."""
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(model))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(len(tokenizer), (60,), generator=generator).tolist()
    for tokens, share in itertools.product((ids, anything), (0.1, 0.5, 0.9)):
        for _ in range(20):
            dropped = (torch.rand(len(tokens), generator=generator) < share).int().tolist()
            found = pieces(tokens, dropped, tokenizer)
            assert "".join(text for _, text in found) == tokenizer.decode(tokens)
            assert all(before != after for (before, _), (after, _) in itertools.pairwise(found))
    # a cut at each place in turn: what stands before it is the decoding of the tokens before it, up to a whole character
    whole = tokenizer.decode(ids)
    for place in range(1, len(ids)):
        (_, before), (_, after) = pieces(ids, [0] * place + [1] * (len(ids) - place), tokenizer)
        assert before == tokenizer.decode(ids[:place]).rstrip("\ufffd")
        assert before + after == whole


class Drops(Callback):
    """An oracle: what each gate did with each sample's tokens, one by one from weights and diagnostics."""

    def __init__(self) -> None:
        self.samples: list[list[Sample]] = []  # of each rollout
        self.found: dict[tuple[int, int], tuple[int, list[Cause]]] = {}  # by rollout and place: steps before, causes

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.samples.append(trainer.datamodule.rollout.samples)

    def on_gate(self, trainer: Any, pl_module: Any, stats: Any, gate: Gate) -> None:
        by = [gate.diagnostics.get(f"masked_by_{name}", torch.zeros_like(gate.keep)) for name in ("position", "budget")]

        def cause(row: int, column: int) -> Cause:
            if gate.weight[row, column] > 0:
                return KEPT
            return THRESHOLD if by[0][row, column] else BUDGET if by[1][row, column] else OTHER

        for row, place in enumerate(stats.sample.tolist()):
            if length := int(stats.mask[row].sum()):
                causes_of_row = [cause(row, column) for column in range(length)]
                self.found[trainer.current_epoch, place] = trainer.global_step, causes_of_row


@pytest.mark.parametrize(
    "region", [CPPO(TopKTV(5), delta=0.06, delta_b=0.03), DPPO(TopKTV(5), delta=0.05)], ids=["CPPO", "DPPO"]
)
def test_a_real_run_shows_what_its_gates_dropped(region: TrustRegion, tiny_model_path: Path, tmp_path: Path) -> None:
    drops, count = Drops(), 7
    data, logger = make_data(tiny_model_path), TensorBoardLogger(tmp_path, name="", version="run")
    module = make_module(tiny_model_path, trust_region=region)
    try:
        callbacks: list[Callback] = [drops, TextSamples(every_n_rollouts=1, count=count)]
        make_trainer(tmp_path, callbacks, rollouts=3, logger=logger).fit(module, datamodule=data)
    finally:
        data.close()
    found, seen = texts(tmp_path), set[Cause | str]()
    assert len(found) == count
    for number, i in itertools.product(range(3), range(count)):
        place = i * 16 // count
        sample, step = drops.samples[number][place], 2 * number
        if (number, place) not in drops.found:
            seen.add("untrained")
            expected = as_markdown(sample, 6000, "not trained on in this run")
        else:
            at, dropped = drops.found[number, place]
            note = f"update {at - step + 1} of 2, at step {at}: {counted(dropped)}"
            note += ": the weights are those that sampled" if at == step else ""
            seen |= {"on-policy"} if at == step else set(dropped)
            assert at > step or set(dropped) == {KEPT}
            expected = as_markdown(sample, 6000, note, pieces(sample.completion.ids.tolist(), dropped, data.sampler.tokenizer))
        assert found[f"samples/{i}"][number] == (step, expected)
    assert seen >= {"untrained", "on-policy", *([OTHER] if isinstance(region, DPPO) else [THRESHOLD, BUDGET])}


def test_nothing_that_a_model_writes_is_markup_or_a_control_character() -> None:
    evil = "<script>alert(1)</script>\n```\n# big\n\x1b[31mred\x00\n" + "x" * 500 + "\ud800"
    sample = rollout([[W]], text=evil).samples[0]
    for marked in ([], [(KEPT, evil[:40]), (THRESHOLD, evil[40:60]), (BUDGET, evil[60:])]):
        text = as_markdown(sample, max_chars=10_000, note="update 1", response=marked)
        response = text.split("*response*\n\n")[1].split("\n\n*answer*")[0]
        assert all(line.startswith("    ") and len(line) <= 114 for line in response.split("\n"))
        assert "\\x1b[31mred\\x00" in response.replace("⟧⟪", "").replace("⟦", "")
        assert all(c.isprintable() or c == "\n" for c in text)


def test_long_texts_keep_their_ends_and_whole_brackets() -> None:
    sample = rollout([[W]], text="a" * 50 + "b" * 50).samples[0]
    assert "    aaaaaaaaaa\n    ... 80 characters left out ...\n    bbbbbbbbbb" in as_markdown(sample, max_chars=20)
    marked = [(KEPT, "aa"), (THRESHOLD, "a" * 48), (BUDGET, "b" * 45), (KEPT, "b" * 5)]
    text = as_markdown(sample, max_chars=20, response=marked)
    assert "    aa⟦aaaaaaaa⟧\n    ... 80 characters left out ...\n    ⟪bbbbb⟫bbbbb" in text


def test_roles_of_a_data_set_are_no_markup() -> None:
    sample = rollout([[W]]).samples[0]
    sample = replace(sample, problem=replace(sample.problem, messages=({"role": "*<b>*", "content": "?"},)))
    assert "*??b??*" in as_markdown(sample, max_chars=100)


def test_without_a_rollout_nothing_is_written(tmp_path: Path) -> None:
    data = Data(OUTCOMES)
    data.rollout = None  # type: ignore[assignment]
    trainer(tmp_path, [TextSamples(every_n_rollouts=1)], rollouts=1).fit(Module(), datamodule=data)
    assert texts(tmp_path) == {}
