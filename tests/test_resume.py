"""A run that is resumed, from wherever it was saved or killed, against one that was left alone: bit by bit."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM

from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.callbacks import FailureCheckpoint, RolloutMetrics, RunCheckpoint
from cppo_lightning.cli import main
from cppo_lightning.engines.engine import Sampling
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.resume import checkpoint_path, generator_states, set_generator_states, tell_other_versions, versions
from cppo_lightning.rollout import RolloutPlan
from cppo_lightning.rollout.evaluation import Evaluation
from cppo_lightning.rollout.sampler import Rollout
from cppo_lightning.rollout.saved import Hand, Unfinished, for_rank
from cppo_lightning.trust_regions import PPOClip
from cppo_lightning.untrusted import write_whole
from cppo_lightning.verifiers import Problem
from tests.callback_rig import scalars
from tests.callback_rig import trainer as logging_trainer
from tests.rank_rig import on_ranks
from tests.test_ahead import plan, run, same
from tests.test_architecture import REPOSITORY
from tests.test_fit import make_data, make_module, make_trainer, weights
from tests.test_stream import make_rollout

ROLLOUTS, STEPS = 3, 6
DEBUG = str(REPOSITORY / "configs" / "debug.yaml")
KEEPER = (
    "--trainer.enable_checkpointing=true",
    "--trainer.callbacks+=cppo_lightning.callbacks.RunCheckpoint",
    "--trainer.callbacks.init_args.dirpath=saved",
    "--trainer.callbacks.init_args.save_last=true",
)


class Saving(Callback):
    """Saves after each update, and after each rollout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"update_{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"rollout_{trainer.global_step}.ckpt")


class Hooks(Callback):
    """Counts rollouts as Lightning does, and draws from every global generator at each update."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.numbers: list[tuple[float, ...]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.epochs.append(trainer.current_epoch)
        self.numbers.append((random.random(), float(np.random.rand()), float(torch.rand(()))))


LIMITS = {"max_epochs": {}, "max_steps": {"max_epochs": -1, "max_steps": STEPS}}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("bound", [0, 1])
def test_a_run_goes_on_from_every_moment_as_if_it_had_never_stopped(
    tiny_model_path: Path, tmp_path: Path, bound: int, limit: str
) -> None:
    """In the middle of a rollout, at its last update and after it, with one drawn ahead, and from a run that was resumed."""
    hooks = Hooks()
    settings: dict[str, Any] = {"rollouts": ROLLOUTS, "trainer": LIMITS[limit]}
    expected, last, _ = run(tiny_model_path, tmp_path, bound, callbacks=[hooks, Saving(tmp_path)], **settings)
    for saved in ("update_1", "rollout_2", "update_3", "update_4"):
        again, path, done = Hooks(), tmp_path / f"{saved}.ckpt", int(saved[-1])
        notes, found, data = run(tiny_model_path, tmp_path, bound, resume=path, callbacks=[again, Saving(tmp_path)], **settings)
        assert same(found, last), saved
        assert notes.losses == expected.losses[done:], saved
        assert notes.versions == expected.versions[done:], saved
        assert again.epochs == hooks.epochs[done:], saved
        assert again.numbers == hooks.numbers[done:], saved
        assert notes.ids == expected.ids[(done + 1) // 2 :], saved
        assert data.progress is not None
        assert data.progress.rollouts.position == 4 * ROLLOUTS


def test_what_is_recomputed_is_the_policy_at_the_rollouts_start(tiny_model_path: Path, tmp_path: Path) -> None:
    def train(resume: Path | None) -> list[Tensor]:
        module = make_module(tiny_model_path, trust_region=PPOClip(), anchor="recomputed")
        data = make_data(tiny_model_path, top_k=0, plan=plan(0))
        make_trainer(tmp_path, [Saving(tmp_path)], 2).fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        data.close()
        return weights(module)

    whole = train(None)
    assert same(train(tmp_path / "update_1.ckpt"), whole)


@dataclass(frozen=True)
class Wary(PPOClip):
    """Counts its gates, and lets through less the more there were."""

    seen: list[int] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen[:] = state["seen"]

    def __call__(self, stats: TokenStats) -> Gate:
        self.seen.append(len(self.seen))
        gate = super().__call__(stats)
        return replace(gate, weight=gate.weight / len(self.seen))


def test_a_trust_region_that_keeps_something_goes_on_with_it(tiny_model_path: Path, tmp_path: Path) -> None:
    def train(resume: Path | None) -> tuple[list[Tensor], list[int]]:
        region = Wary()
        module, data = make_module(tiny_model_path, trust_region=region), make_data(tiny_model_path, top_k=0, plan=plan(0))
        make_trainer(tmp_path, [Saving(tmp_path)], 2).fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        data.close()
        return weights(module), region.seen

    whole, seen = train(None)
    again, seen_again = train(tmp_path / "update_1.ckpt")
    assert seen_again == seen
    assert same(again, whole)


class FailOnce(Callback):
    """Fails before an update that its rollout has been drawn for."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.update:
            raise RolloutError("no more")


@pytest.mark.parametrize("update", [0, 2, 3, 5])
def test_a_failure_in_the_middle_of_a_rollout_loses_and_repeats_nothing(
    tiny_model_path: Path, tmp_path: Path, update: int
) -> None:
    expected, last, _ = run(tiny_model_path, tmp_path, 0, ROLLOUTS)
    with pytest.raises(RolloutError, match="no more"):
        run(tiny_model_path, tmp_path, 0, ROLLOUTS, callbacks=[FailOnce(update), FailureCheckpoint()])
    (saved,) = tmp_path.rglob("after_failure.ckpt")
    notes, found, _ = run(tiny_model_path, tmp_path, 0, ROLLOUTS, resume=saved)
    assert same(found, last)
    assert notes.losses == expected.losses[update:]


def test_a_run_that_max_steps_cut_short_trains_on_the_rest_of_its_rollout(tiny_model_path: Path, tmp_path: Path) -> None:
    expected, last, _ = run(tiny_model_path, tmp_path, 0, ROLLOUTS)
    hooks = Hooks()
    run(tiny_model_path, tmp_path, 0, ROLLOUTS, callbacks=[Saving(tmp_path)], trainer={"max_steps": 3})
    notes, found, _ = run(tiny_model_path, tmp_path, 0, ROLLOUTS, resume=tmp_path / "rollout_3.ckpt", callbacks=[hooks])
    assert same(found, last)
    assert notes.losses == expected.losses[3:]
    assert hooks.epochs == [1, 2, 2]


def test_the_rest_of_a_rollout_keeps_its_updates(tiny_model_path: Path, tmp_path: Path) -> None:
    run(tiny_model_path, tmp_path, 0, 1, callbacks=[Saving(tmp_path)])
    with pytest.raises(ConfigError, match=r"the rest of a rollout of 2 updates, and data\.plan\.updates is 4"):
        run(tiny_model_path, tmp_path, 0, 1, resume=tmp_path / "update_1.ckpt", plan=plan(0, updates=4))
    warmer = {"sampling": Sampling(8, temperature=2.0), "module_settings": {"temperature": 2.0}}
    with pytest.raises(ConfigError, match=r"was sampled at temperature 1\.0, and data\.sampling\.temperature is 2\.0: go on"):
        run(tiny_model_path, tmp_path, 0, 1, resume=tmp_path / "update_1.ckpt", **warmer)
    run(tiny_model_path, tmp_path, 0, 2, resume=tmp_path / "rollout_2.ckpt", **warmer)
    run(tiny_model_path, tmp_path, 1, 1, callbacks=[Saving(tmp_path)])
    with pytest.raises(ConfigError, match=r"with data\.plan\.max_staleness 1, .* too old for 0: go on with 1, or from a check"):
        run(tiny_model_path, tmp_path, 0, 1, resume=tmp_path / "update_1.ckpt")


def test_metrics_of_a_rollout_are_those_of_all_its_updates(tiny_model_path: Path, tmp_path: Path) -> None:
    def train(name: str, resume: Path | None) -> dict[str, list[tuple[int, float]]]:
        module, data = make_module(tiny_model_path), make_data(tiny_model_path)
        callbacks = [RolloutMetrics(), Saving(tmp_path)]
        logging_trainer(tmp_path / name, callbacks, 1).fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        data.close()
        return scalars(tmp_path / name)

    whole = train("whole", None)
    assert train("rest", tmp_path / "update_1.ckpt")["rollout/staleness"] == whole["rollout/staleness"] == [(1, 0.5)]


# what is saved -------------------------------------------------------------------------------------------------------------


def full_rollout() -> Rollout:
    """With everything that a sample may have, completions that are views of a large tensor, and metadata that no file takes."""
    store = torch.arange(100_000)
    rollout = make_rollout([[0, 1], [1, 0], [0, 0]])
    samples = []
    for i, sample in enumerate(rollout.samples):
        ids = store[i * 10 : i * 10 + len(sample.completion.ids)]
        completion = replace(sample.completion, ids=ids, finished=i % 2 == 0)
        problem = Problem(str(i), ({"role": "user", "content": "?"},), "4", "a.jsonl:3", {"entry": object()}, "sums")
        verdict = replace(sample.verdict, extracted="4", parts={"format": 0.5})
        old_logp = completion.logp - 1 if i < 4 else None
        samples.append(replace(sample, completion=completion, problem=problem, verdict=verdict, text="4", old_logp=old_logp))
    return replace(rollout, samples=samples)


def test_a_rollout_comes_back_as_it_was(tmp_path: Path) -> None:
    rollout = full_rollout()
    held = Unfinished(Hand(rollout, torch.arange(6.0).view(3, 2), [[0], [1]], 1), make_rollout([[0, 1]]), generator_states())
    torch.save(held.state_dict(), tmp_path / "held")
    assert (tmp_path / "held").stat().st_size < 50_000, "views are saved as what they show"
    back = Unfinished.from_state(torch.load(tmp_path / "held", weights_only=True))
    assert back.hand is not None
    assert back.ahead is not None
    assert (back.hand.shares, back.hand.trained) == ([[0], [1]], 1)
    assert torch.equal(back.hand.advantages, torch.arange(6.0).view(3, 2))
    for mine, theirs in zip(back.hand.rollout.samples, rollout.samples, strict=True):
        assert mine.row() == theirs.row()
        assert mine.verdict == theirs.verdict
        assert mine.problem == replace(theirs.problem, metadata={})
        assert mine.prompt_ids == theirs.prompt_ids
        for name in ("ids", "logp", "topk_ids", "topk_logp"):
            assert torch.equal(getattr(mine.completion, name), getattr(theirs.completion, name))
        assert (mine.old_logp is None) == (theirs.old_logp is None)
    assert len(back.ahead.samples) == 2
    assert Unfinished.from_state(Unfinished().state_dict()) == Unfinished()


def held_by(rank: int, passes: int = 1) -> Unfinished:
    """Four groups, of which three are dealt to two updates, and a rollout ahead; problems have numbers of their own."""

    def named(rollout: Rollout, prefix: str) -> Rollout:
        samples = [replace(s, problem=replace(s.problem, id=f"{prefix}{rank}.{s.problem.id}")) for s in rollout.samples]
        return replace(rollout, samples=samples)

    dealt = named(make_rollout([[0, 1], [1, 1], [1, 0], [0, 1]]), "p")
    hand = Hand(dealt, torch.arange(8.0).view(4, 2) + 100 * rank, [[0, 2], [3]] * passes, 1)
    return Unfinished(hand, named(make_rollout([[0, 1]] * 3), "n"), {"rank": rank})


def dealt(hand: Hand, update: int) -> list[tuple[str, float]]:
    """Each sample's problem and advantage."""
    groups = hand.rollout.groups()
    return [
        (sample.problem.id, float(a))
        for g in hand.shares[update]
        for sample, a in zip(groups[g], hand.advantages[g], strict=True)
    ]


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_number_of_ranks_goes_on_with_the_same_updates(ranks: int, passes: int) -> None:
    parts = [held_by(0, passes), held_by(1, passes)]
    found = [for_rank(parts, rank, ranks) for rank in range(ranks)]
    hands = [part.hand for part in found if part.hand is not None]
    assert len(hands) == ranks
    for update in range(2 * passes):
        theirs = Counter(pair for part in parts if part.hand for pair in dealt(part.hand, update))
        assert Counter(pair for hand in hands for pair in dealt(hand, update)) == theirs
        assert max(len(h.shares[update]) for h in hands) - min(len(h.shares[update]) for h in hands) <= 1
    whole = Counter(s.problem.id for part in parts if part.hand for s in part.hand.rollout.samples)
    assert Counter(s.problem.id for hand in hands for s in hand.rollout.samples) == whole, "skipped groups count too"
    ahead = Counter(s.problem.id for part in found if part.ahead for s in part.ahead.samples)
    assert ahead == Counter(s.problem.id for part in parts if part.ahead for s in part.ahead.samples)
    if ranks == 2:
        assert [part.generators for part in found] == [{"rank": 0}, {"rank": 1}]
        assert [dealt(hand, 0)[0][0] for hand in hands] == ["p0.0", "p1.0"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_one_rank_lacks_all_draw_again(ranks: int) -> None:
    parts = [held_by(0), replace(held_by(1), ahead=None)]
    assert all(for_rank(parts, rank, ranks).ahead is None for rank in range(ranks))
    assert all(for_rank(parts, rank, ranks).hand is not None for rank in range(ranks))


def test_generators_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.rand(()))]

    draw()
    states = generator_states()
    expected = draw()
    draw()
    set_generator_states(states)
    assert draw() == expected


def test_other_versions_are_told() -> None:
    tell_other_versions(versions())
    with pytest.warns(UserWarning, match=r"written with torch 1\.0, this is 2"):
        tell_other_versions({**versions(), "torch": "1.0"})


# files ---------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_whole({"step": 1}, path)
    with pytest.raises(AttributeError, match="pickle"):
        write_whole({"step": lambda: 2}, path)
    assert torch.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_killed_run_left_is_removed_by_the_next_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".epoch=3.ckpt.unfinished").write_bytes(b"half")
    (tmp_path / ".hidden").touch()
    write_whole({}, tmp_path / "last.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".hidden", "last.ckpt"]


def test_last_is_found_where_a_kill_has_left_it(tmp_path: Path) -> None:
    """A folder that had to give up its name before another had it; and not one that was being deleted."""
    keeper = RunCheckpoint(dirpath=tmp_path, save_last=True)
    trainer = make_trainer(tmp_path, [keeper], enable_checkpointing=True)
    (tmp_path / ".last.ckpt.old").mkdir()
    assert checkpoint_path(trainer, "fit", "last") == str(tmp_path / ".last.ckpt.old")
    (tmp_path / "last.ckpt").mkdir()
    os.utime(tmp_path / ".last.ckpt.old", times=(2**32, 2**32))
    assert checkpoint_path(trainer, "fit", "last") == str(tmp_path / "last.ckpt")


def saved_by(path: Path, folder: Path, **settings: Any) -> dict[str, int]:
    """Global step by name of the checkpoints of a run of three rollouts."""
    keeper = RunCheckpoint(dirpath=folder, enable_version_counter=False, **settings)
    module, data = make_module(path), make_data(path)
    make_trainer(folder, [keeper], ROLLOUTS, enable_checkpointing=True).fit(module, datamodule=data)
    data.close()
    return {file.stem: torch.load(file, weights_only=True)["global_step"] for file in folder.glob("*.ckpt")}


def test_checkpoints_by_steps_and_by_time(tiny_model_path: Path, tmp_path: Path) -> None:
    by_steps = saved_by(tiny_model_path, tmp_path / "steps", every_n_train_steps=2, save_top_k=-1)
    assert by_steps == {"epoch=0-step=2": 2, "epoch=1-step=4": 4, "epoch=2-step=6": 6}
    at_once = {"train_time_interval": timedelta(0), "save_last": True, "save_top_k": 0}
    assert saved_by(tiny_model_path, tmp_path / "time", **at_once) == {"last": 6}
    never = {"train_time_interval": timedelta(hours=1), "save_last": True, "save_top_k": 0}
    assert saved_by(tiny_model_path, tmp_path / "never", **never) == {"last": 6}, "Lightning's, at the end"
    after_the_rollout = torch.load(tmp_path / "steps" / "epoch=0-step=2.ckpt", weights_only=True)
    assert after_the_rollout["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 1


# evaluation on many ranks -------------------------------------------------------------------------------------------------


class FewProblems:
    """The first problems of a set."""

    def __init__(self, source: Any, count: int) -> None:
        self.source, self.count = source, count

    def load(self, bad_rows: Any = None) -> list[Problem]:
        return self.source.load(bad_rows)[: self.count]


def validated(path: Path, folder: Path, problems: int) -> dict[str, float]:
    data = make_data(path)
    data.evaluation = Evaluation(FewProblems(data.prompts, problems), 4, Sampling(max_tokens=8))  # type: ignore[arg-type]
    trainer = make_trainer(folder, [], devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
    (found,) = trainer.validate(make_module(path), datamodule=data, verbose=False)
    data.close()
    return dict(found)


@pytest.mark.slow
def test_fewer_problems_than_ranks(tiny_model_path: Path, tmp_path: Path) -> None:
    """The second rank has none, and takes part in the syncs and in the means all the same."""
    found = on_ranks(2, validated, tiny_model_path, tmp_path, 1)
    assert found[0] == found[1]
    (alone,) = on_ranks(1, validated, tiny_model_path, tmp_path, 1)
    assert found[0] == alone
    assert 0 <= found[0]["val/reward"] <= 1


# other numbers of ranks ---------------------------------------------------------------------------------------------------


def ranks_run(path: Path, folder: Path, resume: str | None) -> list[tuple[int, list[str]]]:
    """Optimizer steps, and the problems of each update."""
    seen = []

    class Seen(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            groups = trainer.datamodule.rollout.groups()
            seen.append((trainer.global_step, sorted(groups[g][0].problem.id for g in batch.group.unique().tolist())))

    module, data = make_module(path), make_data(path, plan=RolloutPlan(8, 8, 2))
    saving = [Saving(folder)] if resume is None else []
    trainer = make_trainer(folder, [Seen(), *saving], 2, devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    data.close()
    return seen


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_on_two(tiny_model_path: Path, tmp_path: Path) -> None:
    two = on_ranks(2, ranks_run, tiny_model_path, tmp_path, None)
    whole = [(step, sorted(a + b)) for (step, a), (_, b) in zip(*two, strict=True)]
    saved = str(tmp_path / "update_1.ckpt")
    (one,) = on_ranks(1, ranks_run, tiny_model_path, tmp_path, saved)
    assert one[0] == whole[1], "the rest of the rollout"
    assert [step for step, _ in one] == [1, 2, 3]
    # responses of the next rollout depend on ranks, and so which groups teach nothing; none of its problems is of another
    assert not {p for _, ids in one[1:] for p in ids} & {p for _, ids in whole[:2] for p in ids}
    assert on_ranks(2, ranks_run, tiny_model_path, tmp_path, saved) == [seen[1:] for seen in two]


# kills --------------------------------------------------------------------------------------------------------------------


LONG = 18  # rollouts


class Kill(Callback):
    """Ends its process by SIGKILL: in the middle of its second checkpoint, or some time after it has written its first.

    Args:
        writing: whether in a checkpoint.
        share: of the checkpoint's bytes, or of the time that the first update took.
    """

    def __init__(self, writing: bool, share: float) -> None:
        self.writing, self.share = writing, share
        self.since, self.updates = 0.0, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.writing:
            save, calls = torch.save, count(1)

            def torn(value: Any, file: Any) -> None:
                save(value, whole := io.BytesIO())
                file.write(whole.getvalue()[: int(self.share * whole.tell())])
                if next(calls) == 2:
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                file.write(whole.getvalue()[int(self.share * whole.tell()) :])

            torch.save = torn  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.updates, before, self.since = self.updates + 1, self.since, time.monotonic()
        if self.updates == 2 and not self.writing:
            # at most the time of a few updates, where the first one was slow too: the run must not be over before its last kill
            seconds = self.share * min(0.05, self.since - before)
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def killable(path: Path, folder: Path, *kill: Kill) -> None:
    """A run in a process of its own, with a rollout drawn ahead, which begins with its last checkpoint if there is one."""
    folder.mkdir(exist_ok=True)
    last = folder / "last.ckpt"
    keeper = RunCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=0, save_last=True, enable_version_counter=False)
    settings: dict[str, Any] = {"rollouts": LONG, "callbacks": [keeper, *kill], "resume": last if last.exists() else None}
    _, found, _ = run(path, folder, 1, trainer={"enable_checkpointing": True}, **settings)
    torch.save(found, folder / "weights")


def exit_code(*arguments: Any) -> int | None:
    process: Any = multiprocessing.get_context("forkserver").Process(target=killable, args=arguments)
    process.start()
    process.join(600)
    return process.exitcode


@pytest.mark.slow
def test_twelve_kills_change_no_bit(tiny_model_path: Path, tmp_path: Path) -> None:
    """Every second one in the middle of a checkpoint."""
    whole, killed, draw = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    assert exit_code(tiny_model_path, whole) == 0
    for number in range(12):
        code = exit_code(tiny_model_path, killed, Kill(bool(number % 2), draw.random()))
        assert code == -signal.SIGKILL, "the run is over" if code == 0 else "it failed"
        assert list(killed.glob(".*.unfinished")) or not number % 2
        torch.load(killed / "last.ckpt", weights_only=True)
    assert exit_code(tiny_model_path, killed) == 0
    assert same(torch.load(killed / "weights"), torch.load(whole / "weights"))
    assert not list(killed.glob(".*.unfinished"))


# the command line ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def debug_run(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The last checkpoint of one rollout of the debug config; afterwards no model can be loaded."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["fit", "--config", DEBUG, "--trainer.max_epochs=1", *KEEPER])

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded before the settings were checked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    return tmp_path / "saved" / "last.ckpt"


def test_a_checkpoint_that_does_not_fit_is_refused_before_a_model_is_loaded(
    debug_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_data = "--data.prompts.init_args.size=100"
    for arguments, message in (
        ([f"--ckpt_path={debug_run}", other_data], "checkpoint was trained on problems with the fingerprint"),
        (["--ckpt_path=last", *KEEPER, other_data], "checkpoint was trained on problems with the fingerprint"),
        (["--ckpt_path=best"], "ckpt_path: 'best' stands for what this process has saved, which is nothing yet"),
        (["--ckpt_path=best", *KEEPER], "ckpt_path: 'best' stands for what this process has saved, which is nothing yet"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config", DEBUG, *arguments])
        error = capsys.readouterr().err
        assert end.value.code == 2, error
        assert message in error
    with pytest.raises(AssertionError, match="a model was loaded"):
        main(["fit", "--config", DEBUG, "--ckpt_path=last", *KEEPER])


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_only_training_begins_anew_where_there_is_no_last_checkpoint(subcommand: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [RunCheckpoint(dirpath=tmp_path, save_last=True)], enable_checkpointing=True)
    assert checkpoint_path(trainer, "fit", "last") is None
    with pytest.raises(ConfigError, match=f"ckpt_path: 'last' stands for the latest .*; give {subcommand} the file"):
        checkpoint_path(trainer, subcommand, "last")
    (tmp_path / "last.ckpt").touch()
    assert checkpoint_path(trainer, subcommand, "last") == str(tmp_path / "last.ckpt")
