"""Rollouts ahead of training: which weights sampled, that every prompt is trained once, and what happens when drawing fails."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.callbacks import FailureCheckpoint, RolloutMetrics, Shutdown
from cppo_lightning.datamodule import RolloutDataModule
from cppo_lightning.divergences import TopKTV
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.interrupts import INTERRUPTS
from cppo_lightning.ranks import AllRanksError, AllRanksInterrupted
from cppo_lightning.rollout import Completion, PromptOrder, ReasoningGymPrompts, RolloutPlan, Sampling, TransformersEngine
from cppo_lightning.rollout.ahead import TrainingRollouts
from cppo_lightning.rollout.background import Background
from cppo_lightning.rollout.sampler import Rollout
from cppo_lightning.trust_regions import CPPO, PPOClip
from cppo_lightning.verifiers import Format, Problem
from tests.callback_rig import scalars
from tests.callback_rig import trainer as logging_trainer
from tests.rank_rig import on_ranks
from tests.test_fit import SUMS, make_data, make_module, make_trainer, unchanged, weights

LIMIT = 60.0  # seconds; only a defect reaches it
UPDATES = 2


class Engine(TransformersEngine):
    """May fail, lie or wait; notes in which thread it samples with which weights."""

    def __init__(self, before: Callable[[int], None] = lambda call: None, lie: int = 0) -> None:
        super().__init__()
        self.before = before
        self.lie = lie
        self.calls: list[tuple[bool, int]] = []  # (in the main thread, optimizer steps that the weights had seen)
        self.generating = 0

    @property
    def version(self) -> int:
        return super().version + self.lie

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert not self.generating, "weights must not change under what is being sampled"
        super().load_weights(weights, version)

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        self.calls.append((threading.current_thread() is threading.main_thread(), super().version))
        self.generating += 1
        try:
            self.before(len(self.calls))
            return super().generate(*args, **kwargs)
        finally:
            self.generating -= 1


class Trained(Callback):
    """Notes what each update was given, and the loss."""

    def __init__(self) -> None:
        self.versions: list[tuple[int, list[int]]] = []  # (optimizer steps, policy versions)
        self.ids: list[list[str]] = []  # of each rollout's problems
        self.batches: list[RolloutBatch] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        self.versions.append((trainer.global_step, batch.policy_version.unique().tolist()))
        self.batches.append(batch)
        if batch_idx == 0:
            self.ids.append([group[0].problem.id for group in trainer.datamodule.rollout.groups()])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]) if outputs else float("nan"))


def plan(ahead: int, **settings: int) -> RolloutPlan:
    return RolloutPlan(**{"prompts": 4, "samples": 8, "updates": UPDATES, "max_staleness": ahead, **settings})


Run = tuple[Trained, list[Tensor], RolloutDataModule]


def run(
    path: Path,
    folder: Path,
    ahead: int,
    rollouts: int = 4,
    callbacks: Sequence[Callback] = (),
    resume: Path | None = None,
    trainer: dict[str, Any] | None = None,
    module_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """A run's notes, its weights at the end, and its datamodule, closed."""
    seed_everything(0, verbose=False)
    notes, module = Trained(), make_module(path, **(module_settings or {}))
    data = make_data(path, **{"engine": Engine(), "plan": plan(ahead), **settings})
    try:
        lightning = make_trainer(folder, [notes, *callbacks], rollouts, **(trainer or {}))
        lightning.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    finally:
        data.close()
    return notes, weights(module), data


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def in_turn(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four rollouts without the option, from an engine that cannot sample ahead."""
    engine = TransformersEngine()
    return run(tiny_model_path, tmp_path_factory.mktemp("run"), 0, engine=engine, plan=RolloutPlan(4, 8, UPDATES))


@pytest.fixture(scope="module")
def ahead(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four rollouts, the last three of them drawn ahead."""
    return run(tiny_model_path, tmp_path_factory.mktemp("run"), 1)


def test_bound_0_is_the_synchronous_run(in_turn: Run, tiny_model_path: Path, tmp_path: Path) -> None:
    expected, expected_weights, _ = in_turn
    notes, found, data = run(tiny_model_path, tmp_path, 0)
    assert notes.losses == expected.losses
    assert same(found, expected_weights)
    assert notes.ids == expected.ids
    assert same([batch.response_ids for batch in notes.batches], [batch.response_ids for batch in expected.batches])
    assert isinstance(data.engine, Engine)
    assert all(main for main, _ in data.engine.calls)
    assert [version for _, version in data.engine.calls] == [0, 2, 4, 6]


def test_bound_1_samples_with_the_weights_of_one_rollout_before(ahead: Run, in_turn: Run) -> None:
    notes, _, data = ahead
    assert notes.versions == [(0, [0]), (1, [0]), (2, [0]), (3, [0]), (4, [2]), (5, [2]), (6, [4]), (7, [4])]
    assert isinstance(data.engine, Engine)
    assert data.engine.calls == [(True, 0), (False, 0), (False, 2), (False, 4)]
    assert notes.ids == in_turn[0].ids, "the same problems in the same order, each once"
    assert len({name for ids in notes.ids for name in ids}) == 16
    # two rollouts from the same weights draw from the same random streams as they would in turn
    assert same([b.response_ids for b in notes.batches[:2]], [b.response_ids for b in in_turn[0].batches[:2]])
    assert not same([b.response_ids for b in notes.batches[2:4]], [b.response_ids for b in in_turn[0].batches[2:4]])


def test_when_a_rollout_is_done_changes_nothing(ahead: Run, tiny_model_path: Path, tmp_path: Path) -> None:
    notes, found, _ = run(tiny_model_path, tmp_path, 1, engine=Engine(lambda call: time.sleep(0.2 * (call % 2))))
    assert notes.losses == ahead[0].losses
    assert same(found, ahead[1])


def test_a_rollout_is_drawn_while_another_is_trained_on(tiny_model_path: Path, tmp_path: Path) -> None:
    """Each rollout ahead waits until an update of the one before has ended: in turn, this would never end."""
    updated = threading.Semaphore(0)

    class Updated(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            updated.release()

    def wait_for_an_update(call: int) -> None:
        if call > 1:
            for _ in range(UPDATES):
                assert updated.acquire(timeout=LIMIT)

    notes, _, _ = run(tiny_model_path, tmp_path, 1, callbacks=[Updated()], engine=Engine(wait_for_an_update))
    assert len(notes.losses) == 4 * UPDATES


class Evaluating(Callback):
    """Samples between rollouts and updates, with today's weights."""

    def __init__(self) -> None:
        self.versions: list[tuple[int, int]] = []

    def sample(self, trainer: Any) -> None:
        data = trainer.datamodule
        data.sync_weights()
        problems = data.load(data.prompts, "training problems")[:3]
        rollout = data.sampler.sample(problems, 2, Sampling(max_tokens=4), seed=data.draw_seed("here", trainer.global_step))
        self.versions.append((trainer.global_step, rollout.version))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.sample(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.sample(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.sample(trainer)


def test_evaluations_wait_and_change_no_training_sample(ahead: Run, tiny_model_path: Path, tmp_path: Path) -> None:
    evaluating = Evaluating()
    slow = Engine(lambda call: time.sleep(0.1))
    notes, found, _ = run(tiny_model_path, tmp_path, 1, callbacks=[evaluating], engine=slow)
    assert evaluating.versions == [(step, step) for step in (0, 1, 2, 3, 4, 5, 6, 7, 8)]
    assert notes.versions == ahead[0].versions
    assert same(found, ahead[1])


def test_refills_are_drawn_ahead_too(tiny_model_path: Path, tmp_path: Path) -> None:
    """Of two samples of a random model half the groups have no spread."""
    notes, _, data = run(tiny_model_path, tmp_path, 1, plan=plan(1, samples=2, max_refills=20))
    assert [len(batch) for batch in notes.batches] == [4] * 8
    assert isinstance(data.engine, Engine)
    assert len(data.engine.calls) > 4, "a run without a refill tests nothing"
    assert [versions for _, versions in notes.versions] == [[0]] * 4 + [[2]] * 2 + [[4]] * 2


def test_skipped_steps_make_samples_younger(tiny_model_path: Path, tmp_path: Path) -> None:
    """One group in each rollout: the second minibatch is empty, and the samples are one step old and not two."""
    notes, _, _ = run(tiny_model_path, tmp_path, 1, plan=plan(1, prompts=2, samples=2), rollouts=8)
    ages = [step - version for (step, versions) in notes.versions for version in versions]
    taken = [loss == loss for loss in notes.losses]
    assert not all(taken), "a run without an empty minibatch tests nothing"
    starts = [sum(taken[: 2 * i]) for i in range(8)]
    lag = [0] + [after - before for before, after in pairwise(starts)]
    assert ages == [lag[i // 2] + (i % 2 and taken[i - 1]) for i in range(16) if len(notes.batches[i])]


@pytest.mark.parametrize(("bound", "lie"), [(0, -1), (0, 1), (1, -1)])
def test_an_engine_that_claims_other_weights_is_refused(tiny_model_path: Path, tmp_path: Path, bound: int, lie: int) -> None:
    module, data = make_module(tiny_model_path), make_data(tiny_model_path, engine=Engine(lie=lie), plan=plan(bound))
    steps = 2 * bound
    with pytest.raises(RolloutError, match=rf"step {steps}, update 0 of its rollout: .* had seen {lie} to {lie} steps"):
        make_trainer(tmp_path, [], 3).fit(module, datamodule=data)
    data.close()
    assert unchanged(module, tiny_model_path) == (bound == 0)


def fail_at(call: int) -> Callable[[int], None]:
    def fail(number: int) -> None:
        if number == call:
            raise RolloutError("the engine is gone")

    return fail


@pytest.mark.parametrize("bound", [0, 1])
@pytest.mark.parametrize("rollout", [1, 3])
def test_a_run_whose_rollouts_fail_goes_on_where_it_was(
    in_turn: Run, tiny_model_path: Path, tmp_path: Path, bound: int, rollout: int
) -> None:
    expected, expected_weights, _ = in_turn
    with pytest.raises(RolloutError, match="the engine is gone") as error:
        run(tiny_model_path, tmp_path, bound, callbacks=[FailureCheckpoint()], engine=Engine(fail_at(rollout)))
    (saved,) = tmp_path.rglob("*.ckpt")
    done = UPDATES * (rollout - 1)
    assert error.value.__notes__ == [f"the run is saved after {done} steps; go on with --ckpt_path {saved}"]
    notes, found, data = run(tiny_model_path, tmp_path, bound, resume=saved)
    assert notes.ids == expected.ids[rollout - 1 :], "no problem lost, none twice"
    assert [step for step, _ in notes.versions] == list(range(done, 8))
    assert data.progress is not None
    assert data.progress.rollouts.position == 16
    if bound == 0:
        assert notes.losses == expected.losses[done:]
        assert same(found, expected_weights)
    else:  # the first one is drawn anew, with today's weights
        ages = [step - version for step, (version,) in notes.versions]
        assert ages[:4] == [0, 1, 2, 3]


def test_a_checkpoint_holds_the_rollout_ahead_and_does_not_count_it(ahead: Run, tiny_model_path: Path, tmp_path: Path) -> None:
    class Saving(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    run(tiny_model_path, tmp_path, 1, callbacks=[Saving()])
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)
    assert saved["RolloutDataModule"]["prompt_position"] == 8
    notes, found, _ = run(tiny_model_path, tmp_path, 1, resume=tmp_path / "1.ckpt")
    assert notes.ids == ahead[0].ids[2:]
    assert notes.versions == [(4, [2]), (5, [2]), (6, [4]), (7, [4])]
    assert same(found, ahead[1])
    in_turn, _, _ = run(tiny_model_path, tmp_path, 0, resume=tmp_path / "1.ckpt")
    assert in_turn.ids == ahead[0].ids[2:]
    assert in_turn.versions == [(4, [4]), (5, [4]), (6, [6]), (7, [6])], "without staleness it is drawn again"
    fewer: dict[str, Any] = {"plan": plan(1, prompts=2)}
    wider: dict[str, Any] = {"top_k": 6, "module_settings": {"trust_region": CPPO(TopKTV(6))}}
    shorter: dict[str, Any] = {"plan": plan(1, updates=1)}  # for which it would be too old
    for other, rollouts in ((fewer, 6), (wider, 4), (shorter, 4)):
        notes, _, data = run(tiny_model_path, tmp_path, 1, rollouts, resume=tmp_path / "1.ckpt", **other)
        assert isinstance(data.engine, Engine)
        assert data.engine.calls[0] == (True, 4), "with other settings it is drawn again"
        assert [name for ids in notes.ids for name in ids] == [name for ids in ahead[0].ids[2:] for name in ids]
    others: dict[str, Any] = {"prompts": ReasoningGymPrompts("basic_arithmetic", 100, params=SUMS), "allow_other_data": True}
    _, _, data = run(tiny_model_path, tmp_path, 1, 3, resume=tmp_path / "1.ckpt", **others)
    assert isinstance(data.engine, Engine)
    assert data.engine.calls[0] == (True, 4), "and of other problems"


def test_other_errors_than_rollouts_are_not_saved(tiny_model_path: Path, tmp_path: Path) -> None:
    def interrupt(call: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as error:
        run(tiny_model_path, tmp_path, 0, callbacks=[FailureCheckpoint()], engine=Engine(interrupt))
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not hasattr(error.value, "__notes__")


def test_a_disk_that_is_full_hides_no_error(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    callback = FailureCheckpoint(str(tmp_path / "file"))
    with pytest.raises(RolloutError, match="the engine is gone") as error:
        run(tiny_model_path, tmp_path, 0, callbacks=[callback], engine=Engine(fail_at(1)))
    assert "could not be saved" in error.value.__notes__[0]


def test_the_last_rollout_draws_none_ahead(tiny_model_path: Path, tmp_path: Path) -> None:
    for limits in ({}, {"max_steps": 4}):
        _, _, data = run(tiny_model_path, tmp_path, 1, rollouts=2 if not limits else 9, trainer=limits)
        assert isinstance(data.engine, Engine)
        assert len(data.engine.calls) == 2


def test_the_default_dtype_of_another_thread_changes_no_sample(tiny_model_path: Path) -> None:
    """A half-precision policy that is trained meanwhile sets it, for the whole process."""
    engine, found = TransformersEngine(), []
    engine.start(str(tiny_model_path))
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found.append(engine.generate([[1, 2, 3]], 4, Sampling(max_tokens=8), 5, seed=1))
        finally:
            torch.set_default_dtype(torch.float32)
    for name in ("ids", "logp", "topk_ids", "topk_logp"):
        plain, other = ([getattr(completion, name) for completion in completions] for completions in found)
        assert same(plain, other), name


def dawdle(call: int) -> None:
    if call > 1:
        while True:
            time.sleep(0.01)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, None])
def test_a_run_that_ends_early_waits_for_no_rollout(
    tiny_model_path: Path, tmp_path: Path, error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rollout ahead would never be done; ``None`` is a run that is asked to stop."""
    monkeypatch.setattr("cppo_lightning.rollout.ahead._STOP_SECONDS", LIMIT)  # for its thread, on a slow machine

    class Ending(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            if error is not None:
                raise error
            trainer.should_stop = True

    engine = Engine(dawdle)
    if error is None:
        run(tiny_model_path, tmp_path, 1, callbacks=[Ending()], engine=engine)
    else:  # Lightning ends an interrupted run by SystemExit
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            run(tiny_model_path, tmp_path, 1, callbacks=[Ending()], engine=engine)
    assert engine.generating == 0, "the thread has ended, and cleaned up"
    assert "rollout ahead" not in [thread.name for thread in threading.enumerate()]


def test_a_signal_while_a_checkpoint_waits_drops_the_rollout_ahead(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take another minute."""
    monkeypatch.setattr("cppo_lightning.rollout.ahead._STOP_SECONDS", LIMIT)
    saving, waited = threading.Event(), []

    class Saving(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            saving.set()
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    def terminate(call: int) -> None:
        if call > 1:
            assert saving.wait(LIMIT)
            os.kill(os.getpid(), signal.SIGTERM)
            end = time.monotonic() + LIMIT
            while time.monotonic() < end:
                time.sleep(0.01)
            waited.append(call)

    with INTERRUPTS.handled(), pytest.raises(SystemExit):
        run(tiny_model_path, tmp_path, 1, callbacks=[Saving(), FailureCheckpoint(), Shutdown()], engine=Engine(terminate))
    assert not waited
    (after,) = tmp_path.rglob("after_failure.ckpt")
    for file in (tmp_path / "saved.ckpt", after):
        saved = torch.load(file, weights_only=True)
        assert (saved["global_step"], saved["RolloutDataModule"]["ranks"][0]["ahead"]) == (UPDATES, None)


def test_staleness_is_logged_in_optimizer_steps(tiny_model_path: Path, tmp_path: Path) -> None:
    data = make_data(tiny_model_path, engine=Engine(), plan=plan(1))
    logging_trainer(tmp_path, [RolloutMetrics()], 3).fit(make_module(tiny_model_path), datamodule=data)
    data.close()
    found = scalars(tmp_path)
    assert found["rollout/staleness"] == [(1, 0.5), (3, 2.5), (5, 2.5)]
    assert found["rollout/staleness_max"] == [(1, 1), (3, 3), (5, 3)]


def test_settings_that_do_not_go_together(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.plan\.max_staleness must be 0 or 1, got 2"):
        plan(2)

    class Alone(Engine):
        concurrent = False

    with pytest.raises(ConfigError, match=r"max_staleness = 1 .* Alone cannot do; take TransformersEngine or VLLMServerEngine"):
        make_data(tiny_model_path, engine=Alone(), plan=plan(1))
    module = make_module(tiny_model_path, trust_region=PPOClip(), anchor="recomputed")
    data = make_data(tiny_model_path, engine=Engine(), plan=plan(1), top_k=0, verifier=Format(""))
    with pytest.raises(ConfigError, match=r"max_staleness = 1 does not go with model\.anchor = recomputed"):
        make_trainer(tmp_path, [], 1).fit(module, datamodule=data)
    data.close()


def test_what_runs_in_the_background_raises_where_its_result_is_asked_for() -> None:
    def fail() -> int:
        raise RolloutError("no")

    failing = Background(fail, "test")
    failing.wait()
    with pytest.raises(RolloutError, match="no"):
        failing.result()
    assert failing.stop(LIMIT)
    assert Background(lambda: 3, "test").result() == 3
    never = threading.Event()
    assert not Background(never.wait, "test").stop(0.01), "what does not listen is not waited for"
    never.set()


# many ranks ---------------------------------------------------------------------------------------------------------------


def rollouts_of(
    rank: int, ranks: int, sync: Callable[[], None], sample: Callable[[list[Problem]], None], **settings: int
) -> TrainingRollouts:
    """Empty ones, of problems of two sets by turns."""
    problems = [Problem(f"{name}/{i}", (), "", dataset=name) for name in "ab" for i in range(50)]
    order, refills = (PromptOrder(problems, seed, {"a": 1, "b": 1}) for seed in (0, 1))

    def sampled(problems: list[Problem], seed: int) -> Rollout:
        sample(problems)
        return Rollout([], 8, 0, 0.0, 0.0)

    return TrainingRollouts(order, refills, plan(1, **settings), (rank, ranks), sync, sampled, lambda *purpose: 0)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_each_rank_has_its_share_of_every_set(ranks: int) -> None:
    asked: list[list[Problem]] = []
    for rank, count in [(0, 1), *((rank, ranks) for rank in range(ranks))]:
        rollouts_of(rank, count, lambda: None, asked.append, prompts=16).next(another=False)
    whole, *parts = asked
    assert [problem for part in parts for problem in part] == whole
    assert [Counter(problem.dataset for problem in part) for part in parts] == [{"a": 8 // ranks, "b": 8 // ranks}] * ranks


def _drawn_ahead(case: str, folder: Path) -> tuple[str, list[bool]]:
    """On a rank: how three rollouts end, and for each sync whether rank 1, whose rollouts ahead take longer, was at one."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    rank, busy, found = torch.distributed.get_rank(), folder / "busy", []

    def sync() -> None:
        found.append(busy.exists())
        torch.distributed.barrier()  # as where weights are gathered from all ranks

    def sample(problems: list[Problem]) -> None:
        if rank == 0 or threading.current_thread() is threading.main_thread():
            return
        if case == "fails":
            raise RolloutError("the engine is gone")
        if case == "is interrupted":
            os.kill(os.getpid(), signal.SIGTERM)
            dawdle(2)
        busy.touch()
        time.sleep(0.5)
        busy.unlink()

    with INTERRUPTS.handled():
        INTERRUPTS.deferred = True
        rollouts = rollouts_of(rank, 2, sync, sample)
        if case == "was kept by one":
            rollouts.restore(4, Rollout([], 8, 0, 0.0, 0.0) if rank == 0 else None)
        try:
            for number in range(3):
                rollouts.next(another=number < 2)
        except (AllRanksError, AllRanksInterrupted) as error:
            return str(error), found
        finally:
            rollouts.stop()
    return f"at {rollouts.position}", found


@pytest.mark.parametrize(
    ("case", "end", "syncs"),
    [
        ("takes long", "at 12", 3),
        ("was kept by one", "at 16", 3),
        ("fails", "rank 1: the engine is gone", 2),
        ("is interrupted", "interrupted by SIGTERM", 2),
    ],
)
def test_whatever_becomes_of_one_ranks_rollout_ahead_all_sync_together(case: str, end: str, syncs: int, tmp_path: Path) -> None:
    assert on_ranks(2, _drawn_ahead, case, tmp_path) == [(end, [False] * syncs)] * 2


def _rank(rank: int, port: int, folder: Path, model: Path) -> None:
    """Rank 1's engine is lost while it draws ahead; then both go on from the checkpoint."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    two = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    engine = Engine(fail_at(2 if rank == 1 else 0))
    with pytest.raises(AllRanksError) as error:
        run(model, folder, 1, 3, [FailureCheckpoint()], trainer=two, engine=engine)
    messages = [str(error.value), *error.value.__notes__]
    notes, found, _ = run(model, folder, 1, 3, resume=folder / "checkpoints" / "after_failure.ckpt", trainer=two)
    torch.save((messages, notes.ids, notes.versions, found), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_fail_together_and_go_on(ahead: Run, tiny_model_path: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, tmp_path, tiny_model_path), nprocs=2)  # type: ignore[attr-defined]
    (messages, ids, versions, found), *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    saved = tmp_path / "checkpoints" / "after_failure.ckpt"
    assert messages == [
        "rank 1: the engine is gone",
        f"the run is saved after {UPDATES} steps; go on with --ckpt_path {saved}",
    ]
    assert versions == [(2, [2]), (3, [2]), (4, [2]), (5, [2])]
    for theirs, their_ids, their_versions, their_weights in others:
        assert (theirs, their_versions) == (messages, versions)
        assert same(their_weights, found)
        dealt = [mine + other for mine, other in zip(ids, their_ids, strict=True)]
        assert dealt == ahead[0].ids[1:3], "one rank's order of problems, in two parts"
