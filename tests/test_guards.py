"""Steps that cannot be taken, signals, and ranks that die: what is lost, what is left, and that nothing waits for ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file

from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.callbacks import FailureCheckpoint, NonFiniteGuard, Shutdown, TrustRegionFigures
from cppo_lightning.divergences import BinaryTV
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.interrupts import INTERRUPTS, Interrupted
from cppo_lightning.losses import Totals
from cppo_lightning.module import RLVRModule
from cppo_lightning.policy import ResponseLogProbs
from cppo_lightning.rank_watch import RankWatch
from cppo_lightning.ranks import AllRanksInterrupted, check_signals, on_all_ranks
from cppo_lightning.sequences import MicroBatch
from cppo_lightning.trust_regions import CPPO, PPOClip, TrustRegion
from cppo_lightning.verifiers import Format
from tests.callback_rig import events, scalars
from tests.rank_rig import on_ranks
from tests.test_fit import make_data, make_module, make_trainer, unchanged, weights

DEBUG = Path(__file__).parents[1] / "configs" / "debug.yaml"
MINUTE = 60  # in which the issue wants a dead rank's companions gone


# --- steps that are not taken


@dataclass
class Poison(TrustRegion):
    """Gives the steps whose numbers are in ``at`` a gradient that is no number."""

    at: tuple[int, ...]
    calls: int = 0

    def __call__(self, stats: TokenStats) -> Gate:
        weight = stats.ratio * stats.mask
        if self.calls in self.at:
            weight[0, 0] = float("nan")
        self.calls += 1
        return Gate(weight, stats.mask)


class InfinitePenalty(RLVRModule):
    """Its loss is infinite, its gradient is none that one would notice."""

    def _accumulate(self, part: MicroBatch, totals: Totals) -> torch.Tensor:
        return super()._accumulate(part, totals) + torch.tensor([0.0, float("inf"), 0.0])


def fit(
    folder: Path,
    module: RLVRModule,
    data: Any,
    rollouts: int,
    callbacks: list[Any],
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Trainer:
    trainer = make_trainer(folder, callbacks, rollouts, **settings)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    finally:
        data.close()
    return trainer


def guarded(folder: Path, module: RLVRModule, data: Any, guard: NonFiniteGuard, rollouts: int = 3) -> Trainer:
    logger = TensorBoardLogger(folder, name="", version="run")
    return fit(folder, module, data, rollouts, [guard, FailureCheckpoint()], logger=logger)


def test_a_step_that_cannot_be_taken_is_counted_and_its_minibatch_kept(tiny_model_path: Path, tmp_path: Path) -> None:
    module = make_module(tiny_model_path, trust_region=Poison((1, 4)), micro_batch_tokens=100_000)
    data, guard = make_data(tiny_model_path), NonFiniteGuard(max_dumps=1)
    with pytest.warns(UserWarning, match="the loss or the gradient is not finite"):
        trainer = guarded(tmp_path, module, data, guard)
    assert (trainer.global_step, guard.count) == (4, 2)
    assert [value for _, value in scalars(tmp_path)["train/nonfinite_steps"]][-3:] == [1, 2, 2]
    folder = tmp_path / "run" / "nonfinite"
    assert [f.name for f in sorted(folder.rglob("*"))] == ["0001", "rank0.json", "rank0.safetensors"]
    tensors, told = load_file(folder / "0001" / "rank0.safetensors"), json.loads((folder / "0001" / "rank0.json").read_text())
    assert (told["step"], told["rollout"], told["ranks"], told["surrogate"]) == (1, 0, [0], "nan")
    assert tensors["prompt_ids"].shape[0] == tensors["advantages"].shape[0] == len(told["problems"])
    by_id = {problem.id: problem for problem in data.sets.training.problems}  # type: ignore[union-attr]
    for problem, ids, mask in zip(told["problems"], tensors["prompt_ids"], tensors["prompt_mask"], strict=True):
        assert data.template.encode(data.sampler.tokenizer, by_id[problem]) == ids[mask].tolist()
    assert set(told["parameters"]) == {name for name, p in module.named_parameters() if p.requires_grad}


def test_a_loss_that_is_not_finite_with_a_gradient_that_is(tiny_model_path: Path, tmp_path: Path) -> None:
    module = make_module(tiny_model_path)
    module.__class__ = InfinitePenalty
    guard = NonFiniteGuard(max_in_a_row=None)
    with pytest.warns(UserWarning, match="the loss or the gradient is not finite"):
        trainer = guarded(tmp_path, module, make_data(tiny_model_path), guard, rollouts=2)
    assert (trainer.global_step, guard.count) == (0, 4)
    assert unchanged(module, tiny_model_path)
    told = json.loads((tmp_path / "run" / "nonfinite" / "0001" / "rank0.json").read_text())
    assert (told["reference_kl"], told["parameters"]) == ("inf", [])


class NaNForward(Callback):
    """Gives the first micro-batch's first token a log-probability that is no number."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        def spoil(module: Any, given: Any, output: ResponseLogProbs) -> ResponseLogProbs:
            hook.remove()
            logp = output.logp.clone()
            logp[0, 0] = float("nan")
            return replace(output, logp=logp)

        hook = pl_module.policy.register_forward_hook(spoil)


@pytest.mark.parametrize("region", [CPPO(BinaryTV()), PPOClip()], ids=["CPPO", "PPO"])
def test_pictures_outlive_a_forward_pass_that_gives_no_number(
    region: TrustRegion, tiny_model_path: Path, tmp_path: Path
) -> None:
    module = make_module(tiny_model_path, trust_region=region, micro_batch_tokens=100_000)
    guard, logger = NonFiniteGuard(), TensorBoardLogger(tmp_path, name="", version="run")
    callbacks = [guard, TrustRegionFigures(), NaNForward()]
    with pytest.warns(UserWarning, match="the loss or the gradient is not finite"):
        trainer = fit(tmp_path, module, make_data(tiny_model_path), 2, callbacks, logger=logger)
    assert (trainer.global_step, guard.count) == (3, 1)
    pictures = events(tmp_path).Tags()["images"]
    assert "figures/divergence_by_position" in pictures
    assert ("figures/budget" in pictures) is isinstance(region, CPPO)


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(tiny_model_path: Path, tmp_path: Path) -> None:
    module = make_module(tiny_model_path, trust_region=Poison((1, 3, 4)), micro_batch_tokens=100_000)
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(RolloutError, match=r"at step 2 .* 2 times in a row") as end,
    ):
        guarded(tmp_path, module, make_data(tiny_model_path), NonFiniteGuard(max_in_a_row=2), rollouts=9)
    assert "saved after 2 steps" in end.value.__notes__[0]
    saved = torch.load(tmp_path / "run" / "checkpoints" / "after_failure.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    state = next(value for key, value in saved["callbacks"].items() if key.startswith("NonFiniteGuard"))
    assert state == {"count": 3, "in_a_row": 0}
    again, guard = make_module(tiny_model_path, trust_region=Poison((0,)), micro_batch_tokens=100_000), NonFiniteGuard(2)
    path = tmp_path / "run" / "checkpoints" / "after_failure.ckpt"
    with pytest.warns(UserWarning, match="not finite"):
        trainer = fit(tmp_path, again, make_data(tiny_model_path), 4, [guard], path)
    assert (trainer.global_step, guard.count) == (4, 4), "one more bad step does not stop the run that goes on"


def test_a_minibatch_without_anything_to_learn_is_not_counted(tiny_model_path: Path, tmp_path: Path) -> None:
    guard, data = NonFiniteGuard(max_in_a_row=2), make_data(tiny_model_path, verifier=Format("[^\\W\\w]"))  # never right
    guard.in_a_row = 1
    with pytest.warns(UserWarning, match="it teaches nothing and no step is taken"):
        trainer = guarded(tmp_path, make_module(tiny_model_path), data, guard, rollouts=2)
    assert (trainer.global_step, guard.count, guard.in_a_row) == (0, 0, 1)


@pytest.mark.parametrize("settings", [{"max_in_a_row": 0}, {"max_dumps": -1}])
def test_limits_that_cannot_work(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        NonFiniteGuard(**settings)


def _one_rank_poisoned(model: str, folder: str) -> tuple[int, int]:
    """The loss of rank 1 alone is not finite.  With this seed every update of both has groups to train on."""
    two = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    module, guard = make_module(Path(model)), NonFiniteGuard(dirpath=folder)
    if os.environ["RANK"] == "1":
        module.__class__ = InfinitePenalty
    trainer = fit(Path(folder), module, make_data(Path(model), seed=3), 1, [guard], **two)
    return trainer.global_step, guard.count


@pytest.mark.slow
def test_no_rank_takes_a_step_that_another_cannot(tiny_model_path: Path, tmp_path: Path) -> None:
    assert on_ranks(2, _one_rank_poisoned, str(tiny_model_path), str(tmp_path)) == [(0, 2)] * 2
    told = [json.loads((tmp_path / "0001" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["ranks"] for one in told] == [[1], [1]]
    assert [one["reference_kl"] for one in told] == ["0.0", "inf"]
    assert not set(told[0]["problems"]) & set(told[1]["problems"])


# --- signals


@pytest.fixture
def handled() -> Iterator[None]:
    with INTERRUPTS.handled():
        yield


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python handles it between two instructions


@pytest.mark.usefixtures("handled")
def test_signals_wait_where_something_is_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cppo_lightning.interrupts._SAME_SECONDS", 3600.0)  # however slow the machine, they are one signal
    INTERRUPTS.deferred = True
    send(signal.SIGINT)
    assert INTERRUPTS.received is signal.SIGINT
    send(signal.SIGINT)  # the terminal's, passed on by a launcher
    with pytest.raises(Interrupted, match="interrupted by SIGINT"):
        check_signals(torch.device("cpu"))
    with pytest.raises(Interrupted), INTERRUPTS.at_once():
        pytest.fail("it came before, so nothing more is begun")
    assert INTERRUPTS.deferred


@pytest.mark.usefixtures("handled")
def test_signals_raise_where_nothing_is_half_done() -> None:
    INTERRUPTS.deferred = True
    with pytest.raises(Interrupted, match="SIGTERM"), INTERRUPTS.at_once():
        send()
    assert INTERRUPTS.deferred


@pytest.mark.usefixtures("handled")
def test_a_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cppo_lightning.interrupts._SAME_SECONDS", 0.0)
    INTERRUPTS.deferred = True
    send()
    with pytest.raises(KeyboardInterrupt) as end:
        send()
    assert type(end.value) is KeyboardInterrupt, "such a run is not saved"


@pytest.mark.usefixtures("handled")
def test_other_threads_are_left_alone() -> None:
    INTERRUPTS.deferred = True
    seen = []

    def sample() -> None:
        with INTERRUPTS.at_once():
            seen.append(INTERRUPTS.deferred)

    thread = threading.Thread(target=sample)
    thread.start()
    thread.join()
    assert seen == [True], "the main thread may be in the middle of a step"


def test_a_signal_that_the_process_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it runs in the background
    try:
        with INTERRUPTS.handled():
            send(signal.SIGINT)
            assert INTERRUPTS.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class SignalInStep(Callback):
    """Sends the process a signal in the middle of its ``n``-th micro-batch, between forward and backward."""

    def __init__(self, n: int) -> None:
        self.n, self.seen = n, 0

    def on_gate(self, *_: object) -> None:
        self.seen += 1
        if self.seen == self.n:
            send()


def test_a_signal_in_a_step_finishes_the_step_and_leaves_it_in_a_checkpoint(tiny_model_path: Path, tmp_path: Path) -> None:
    whole, module, resumed = (make_module(tiny_model_path, micro_batch_tokens=100_000) for _ in range(3))
    fit(tmp_path, whole, make_data(tiny_model_path), 2, [])
    callbacks = [SignalInStep(3), FailureCheckpoint(str(tmp_path)), Shutdown()]
    with INTERRUPTS.handled(), pytest.raises(SystemExit) as end:
        fit(tmp_path, module, make_data(tiny_model_path), 2, callbacks)
    assert isinstance(end.value.__context__, Interrupted)
    assert "saved after 3 steps" in end.value.__context__.__notes__[0]
    fit(tmp_path, resumed, make_data(tiny_model_path), 2, [], tmp_path / "after_failure.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


# --- ranks


def _agreed() -> dict[str, Any]:
    """Rank 1 alone is interrupted: at a step's end, and in the middle of what both do."""
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    with INTERRUPTS.handled():
        check_signals(torch.device("cpu"))
        INTERRUPTS.deferred = True

        def sample() -> None:
            with INTERRUPTS.at_once():
                if torch.distributed.get_rank() == 1:
                    send(signal.SIGINT)

        for name, call in (("in", lambda: on_all_ranks(sample)), ("after", lambda: check_signals(torch.device("cpu")))):
            try:
                call()
            except AllRanksInterrupted as error:
                found[name] = error.received
    torch.distributed.destroy_process_group()
    return found


def _passed_on() -> float:
    """Rank 1 gets a signal; how long rank 0, which waits for a lock, sleeps on."""
    torch.distributed.init_process_group("gloo")
    with INTERRUPTS.handled():
        watch = RankWatch()
        torch.distributed.barrier()
        started = time.monotonic()
        try:
            if torch.distributed.get_rank() == 1:
                send()
            threading.Event().wait(MINUTE)
        except Interrupted:
            pass
        seconds = time.monotonic() - started
        torch.distributed.barrier()
        watch.close()
    torch.distributed.destroy_process_group()
    return seconds


def test_what_one_rank_receives_all_do() -> None:
    assert on_ranks(2, _agreed) == [{"in": signal.SIGINT, "after": signal.SIGINT}] * 2
    assert max(on_ranks(3, _passed_on)) < MINUTE / 2


ENDING = """
import os, signal, time
from pathlib import Path
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from cppo_lightning import rank_watch
from cppo_lightning.rollout import TransformersEngine

def here():
    # the whole run waits for it, and a busy machine too has heard of the other rank's end by then
    rank_watch._GRACE_SECONDS = 3.0
    rank = os.environ.get("LOCAL_RANK", "0")
    Path(f"{rank}.writing").write_text(str(os.getpid()))
    Path(f"{rank}.writing").rename(f"{rank}.pid")
    return int(rank)

class Long(TransformersEngine):
    '''Its second rollout takes an hour.'''
    rollouts = 0

    def generate(self, prompts, n, *more, **further):
        if n == 8:
            self.rollouts += 1
            if self.rollouts == 2:
                here()
                time.sleep(3600)
        return super().generate(prompts, n, *more, **further)

class Busy(Callback):
    '''Rank 1 takes an hour for its second step, while rank 0 waits for it in a collective.'''

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1 and here() == 1:
            time.sleep(3600)

class Failing(Callback):
    '''An evaluation that fails on one rank, while the other is at it.'''

    def on_train_epoch_end(self, trainer, module):
        if here() == 1:
            raise ValueError("out of luck")
        time.sleep(3600)
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_model_path: Path) -> Path:
    settings = yaml.safe_load(DEBUG.read_text())
    settings["model"]["policy"]["path"] = str(tiny_model_path)
    quiet = {"accelerator": "cpu", "max_epochs": 5, "enable_model_summary": False, "enable_progress_bar": False}
    parallel = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    settings["trainer"] = {**quiet, **parallel, "default_root_dir": str(tmp_path), "logger": False}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "ending.py").write_text(ENDING)
    return tmp_path


def run_two(folder: Path, arguments: list[str], then: Callable[[list[int]], None]) -> tuple[int, str, float]:
    """Start two ranks and wait until both say where they are; exit code, output, and seconds from then until both are gone."""
    command = [sys.executable, "-m", "cppo_lightning", "fit", "--config", "two.yaml", *arguments]
    with open(folder / "output", "w") as output:
        run = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
    files, limit = [folder / f"{rank}.pid" for rank in (0, 1)], time.monotonic() + 300
    try:
        while not all(file.exists() for file in files):
            assert run.poll() is None, (folder / "output").read_text()
            assert time.monotonic() < limit, (folder / "output").read_text()
            time.sleep(0.1)
        pids = [int(file.read_text()) for file in files]
        started = time.monotonic()
        then(pids)
        code = run.wait(2 * MINUTE)
        while is_there(pids[1]) and time.monotonic() < started + 2 * MINUTE:
            time.sleep(0.1)
        return code, (folder / "output").read_text(), time.monotonic() - started
    finally:
        for file in files:
            if file.exists() and is_there(pid := int(file.read_text())):
                os.kill(pid, signal.SIGKILL)
        run.kill()
        run.wait()


def is_there(pid: int) -> bool:
    """Whether the process runs; one that has ended and that nobody has asked for its exit code does not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


SAMPLING, TRAINING = ["--data.engine=ending.Long"], ["--trainer.callbacks+=ending.Busy"]
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for in /proc")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(
    ("arguments", "dead"),
    [(SAMPLING, 0), (SAMPLING, 1), (TRAINING, 1)],
    ids=["rank 0 while sampling", "rank 1 while sampling", "rank 1 in a step"],
)
def test_a_killed_rank_ends_the_other(arguments: list[str], dead: int, folder: Path) -> None:
    code, output, seconds = run_two(folder, arguments, lambda pids: os.kill(pids[dead], signal.SIGKILL))
    assert code != 0
    assert seconds < MINUTE
    assert f"stopped: rank {dead} has ended; without it rank {1 - dead} ends too" in output


@pytest.mark.slow
@needs_proc
def test_a_failing_rank_ends_the_other_with_its_traceback_first(folder: Path) -> None:
    code, output, seconds = run_two(folder, ["--trainer.callbacks+=ending.Failing"], lambda pids: None)
    assert code != 0
    assert seconds < MINUTE
    traceback, found, _ = output.partition(
        "stopped: rank 1 has ended after ValueError: out of luck; without it rank 0 ends too"
    )
    assert found, output
    assert "ValueError: out of luck" in traceback


@pytest.mark.slow
@needs_proc
def test_a_signal_to_one_rank_ends_both_with_a_checkpoint(folder: Path) -> None:
    arguments = [*SAMPLING, "--trainer.callbacks+=cppo_lightning.callbacks.FailureCheckpoint"]
    code, output, seconds = run_two(folder, arguments, lambda pids: os.kill(pids[1], signal.SIGTERM))
    assert code == 143
    assert seconds < MINUTE
    assert "stopped: interrupted by SIGTERM; the run is saved after 2 steps" in output
    assert "Traceback" not in output
    saved = torch.load(folder / "checkpoints" / "after_failure.ckpt", weights_only=True)
    assert saved["global_step"] == 2
