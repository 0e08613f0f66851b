"""Whole runs with vLLM, and with a stand-in for it: servers killed or stuck, one rank and two, rollouts ahead."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from cppo_lightning.callbacks import FailureCheckpoint
from cppo_lightning.cli import main
from cppo_lightning.engines.vllm.engine import VLLMEngine
from cppo_lightning.engines.vllm.settings import CPU_DEFAULTS
from cppo_lightning.engines.vllm_server.engine import VLLMServerEngine
from cppo_lightning.engines.vllm_server.process import ServerProcess
from cppo_lightning.errors import RolloutError
from cppo_lightning.rollout import Completion, ReasoningGymPrompts, RolloutEngine, RolloutPlan
from tests import fake_vllm_server
from tests.test_ahead import Run, Trained, plan, run, same
from tests.test_fit import SUMS, initial_weights
from tests.test_shutdown import DEBUG, ended, running
from tests.test_vllm_server_engine import KEY, PATIENT, eventually, group_of

ROLLOUTS = 20
KILLS = ["sampling", "sampling", "loading", "loading", "training"]
PROMPTS = ReasoningGymPrompts("basic_arithmetic", 200, params=SUMS | {"max_digits": 2})  # more than a run takes
CONTEXT = 256
SECONDS = 60.0  # in which an interrupted run has ended: half the time in which it would notice that its server is stuck


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Servers without a model in the place of vLLM's, with ``tmp_path`` as their working folder."""
    fake_vllm_server.stand_in(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def elsewhere(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Settings for a vLLM server that several runs use, one after the other."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "own").mkdir()
    limits = {"dtype": "float32", "max_logprobs": 20, "max_model_len": CONTEXT, "enable_chunked_prefill": False}
    arguments = {"model": str(tiny_model_path), **CPU_DEFAULTS, **limits}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv(KEY, "secret")
        process = ServerProcess("127.0.0.1", arguments, "secret", folder / "own", "server.log")
        process.start()
        yield {"urls": [f"http://127.0.0.1:{process.port}"], "weights_folder": str(folder), "max_model_len": CONTEXT}
        process.close()


class Killed(VLLMServerEngine):
    """Its server is killed in some rollouts, while it samples, takes over weights, or while the policy is trained.

    Args:
        kills: number of the rollout, from 0, and what goes on then.
        seed: of the moments.
    """

    def __init__(self, kills: dict[int, str], seed: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.kills = kills
        self.random = random.Random(seed)
        self.drawn = 0  # rollouts
        self.killed: list[str] = []

    def kill(self, phase: str, rollout: int) -> None:
        if self.kills.get(rollout) == phase:
            del self.kills[rollout]
            os.killpg(group_of(self), signal.SIGKILL)
            self.killed.append(phase)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        moment = self.random.randrange(20)  # parameters that have been written; then the server takes them over

        def passed_on() -> Iterator[tuple[str, Tensor]]:
            for number, weight in enumerate(weights):
                if number == moment:
                    self.kill("loading", self.drawn)
                yield weight

        super().load_weights(passed_on(), version)

    def generate(self, *args: Any, on_completion: Callable[[int, Completion], None], **kwargs: Any) -> list[Completion]:
        left = self.random.randrange(1, 32)

        def one_more(place: int, completion: Completion) -> None:
            nonlocal left
            left -= 1
            if not left:
                self.kill("sampling", self.drawn)
            on_completion(place, completion)

        completions = super().generate(*args, on_completion=one_more, **kwargs)
        self.drawn += 1
        return completions


class Watched(Callback):
    """Notes every rollout's problems and rewards, and gives the moment between two updates."""

    def __init__(self) -> None:
        self.rollouts: list[list[tuple[str, float]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.rollouts.append([(s.problem.id, s.verdict.reward) for s in trainer.datamodule.rollout.samples])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and isinstance(trainer.datamodule.engine, Killed):
            trainer.datamodule.engine.kill("training", trainer.current_epoch)

    def accuracy(self, since: int = 0) -> float:
        rewards = [reward for rollout in self.rollouts[since:] for _, reward in rollout]
        return sum(rewards) / len(rewards)


def watched(path: Path, folder: Path, rollouts: int, engine: RolloutEngine, ahead: int = 0, **more: Any) -> tuple[Watched, Run]:
    watch = Watched()
    return watch, run(path, folder, ahead, rollouts, [watch], engine=engine, prompts=PROMPTS, **more)


def moments(phases: Sequence[str], seed: int) -> dict[int, str]:
    """A random rollout for each phase, in a random order; between two of them there is one in which nothing happens."""
    drawn = random.Random(seed)
    span = ROLLOUTS // len(phases)
    return {i * span + drawn.randrange(span - 1): phase for i, phase in enumerate(drawn.sample(phases, len(phases)))}


def assert_each_problem_is_trained_on_once(watch: Watched, notes: Trained, calm: Watched, calm_notes: Trained) -> None:
    """Those of a run without kills, in the same order, with as many responses, from weights that are as old."""
    assert notes.ids == calm_notes.ids
    assert len({name for ids in notes.ids for name in ids}) == 4 * ROLLOUTS
    for rollout, expected in zip(watch.rollouts, calm.rollouts, strict=True):
        assert [name for name, _ in rollout] == [name for name, _ in expected]
    assert notes.versions == calm_notes.versions


@pytest.mark.slow
def test_five_kills_change_nothing(stand_in: None, tiny_model_path: Path, tmp_path: Path) -> None:
    engine = Killed(moments(KILLS, seed=0), seed=0, patience=PATIENT)
    calm, (calm_notes, calm_weights, _) = watched(tiny_model_path, tmp_path, ROLLOUTS, VLLMServerEngine(patience=PATIENT))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch, (notes, found, _) = watched(tiny_model_path, tmp_path, ROLLOUTS, engine)
    assert sorted(engine.killed) == sorted(KILLS)
    assert sum("started again (1 of 3)" in str(warning.message) for warning in caught) == 5
    assert_each_problem_is_trained_on_once(watch, notes, calm, calm_notes)
    assert watch.rollouts == calm.rollouts
    assert notes.losses == calm_notes.losses
    assert same(found, calm_weights)
    assert not same(found, initial_weights(tiny_model_path)), "a run that learns nothing shows nothing"


@pytest.mark.parametrize("bound", [0, 1])
def test_a_server_that_is_gone_for_good_ends_the_run_with_a_checkpoint(
    stand_in: None, bound: int, tiny_model_path: Path, tmp_path: Path
) -> None:
    class Breaking(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == 3:
                (tmp_path / "broken").touch()
                os.killpg(group_of(trainer.datamodule.engine), signal.SIGKILL)

    engine = VLLMServerEngine(patience=replace(PATIENT, restarts=1))
    with (
        pytest.warns(UserWarning, match="started again"),
        pytest.raises(RolloutError, match="no memory for the model") as error,
    ):
        run(tiny_model_path, tmp_path, bound, 4, [Breaking(), FailureCheckpoint()], engine=engine)
    (tmp_path / "broken").unlink()
    (saved,) = tmp_path.rglob("*.ckpt")
    assert error.value.__notes__ == [f"the run is saved after 4 steps; go on with --ckpt_path {saved}"]
    whole, _, _ = run(tiny_model_path, tmp_path, bound, 4, engine=VLLMServerEngine(patience=PATIENT))
    rest, _, _ = run(tiny_model_path, tmp_path, bound, 4, engine=VLLMServerEngine(patience=PATIENT), resume=saved)
    assert rest.ids == whole.ids[2:]
    if not bound:
        assert rest.losses == whole.losses[4:]


STILL = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}  # weights stay as they are, so that older ones are the same ones
SLOWLY = {"optimizer": lambda p: torch.optim.AdamW(p, lr=5e-4)}  # rewards go on varying for as long as the runs here last
AGES = {0: [0, 1] * 4, 1: [0, 1] + [2, 3] * 3}  # by max_staleness: of each update's samples, in optimizer steps


def ages(notes: Trained) -> list[int]:
    return [step - version for step, versions in notes.versions for version in versions]


def test_rollouts_ahead_differ_by_their_age_alone(stand_in: None, tiny_model_path: Path, tmp_path: Path) -> None:
    found = [
        run(tiny_model_path, tmp_path, ahead, engine=VLLMServerEngine(patience=PATIENT), module_settings=STILL)
        for ahead in (0, 1)
    ]
    for ahead, (notes, _, _) in enumerate(found):
        assert ages(notes) == AGES[ahead]
    (in_turn, _, _), (notes, _, _) = found
    assert notes.ids == in_turn.ids
    assert notes.losses == in_turn.losses
    for ours, theirs in zip(notes.batches, in_turn.batches, strict=True):
        assert same([ours.response_ids, ours.rollout_logp], [theirs.response_ids, theirs.rollout_logp])


def test_bound_0_is_the_synchronous_run(stand_in: None, tiny_model_path: Path, tmp_path: Path) -> None:
    without = RolloutPlan(prompts=4, samples=8, updates=2)
    expected, expected_weights, _ = run(tiny_model_path, tmp_path, 0, engine=VLLMServerEngine(patience=PATIENT), plan=without)
    notes, found, _ = run(tiny_model_path, tmp_path, 0, engine=VLLMServerEngine(patience=PATIENT))
    assert notes.losses == expected.losses
    assert same(found, expected_weights)


@pytest.mark.vllm
@pytest.mark.soak
def test_vllm_killed_five_times(elsewhere: dict[str, Any], tiny_model_path: Path, tmp_path: Path) -> None:
    """The run without kills has a server of its own."""
    engine = Killed(moments(KILLS, seed=0), seed=0, max_model_len=CONTEXT)
    watch, (notes, _, _) = watched(tiny_model_path, tmp_path, ROLLOUTS, engine, module_settings=SLOWLY)
    assert sorted(engine.killed) == sorted(KILLS)
    calm, (calm_notes, _, _) = watched(
        tiny_model_path, tmp_path, ROLLOUTS, VLLMServerEngine(**elsewhere), module_settings=SLOWLY
    )
    assert_each_problem_is_trained_on_once(watch, notes, calm, calm_notes)
    first = min(moments(KILLS, seed=0))
    assert watch.rollouts[: first + 1] == calm.rollouts[: first + 1], "until then rounding had no reason to differ"
    assert watch.accuracy() == pytest.approx(calm.accuracy(), abs=0.1)
    assert watch.accuracy(ROLLOUTS - 5) > watch.accuracy() > 0.3, "a run that learns nothing shows nothing"


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_samples_the_same_ahead(elsewhere: dict[str, Any], tiny_model_path: Path, tmp_path: Path) -> None:
    (in_turn, _, _), (notes, _, _) = (
        run(tiny_model_path, tmp_path, ahead, engine=VLLMServerEngine(**elsewhere), module_settings=STILL) for ahead in (0, 1)
    )
    assert (ages(in_turn), ages(notes)) == (AGES[0], AGES[1])
    assert notes.ids == in_turn.ids
    equal = [
        torch.equal(ours, theirs)
        for batch, expected in zip(notes.batches, in_turn.batches, strict=True)
        for ours, theirs in zip(batch.response_ids, expected.response_ids, strict=True)
    ]
    assert sum(equal) > 0.9 * len(equal), "little but rounding may differ"


def _rank(rank: int, port: int, model: Path, folder: Path, server: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    two = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    torch.save([facts(model, folder, engine, trainer=two) for engine in engines(server)], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def engines(server: dict[str, Any]) -> list[RolloutEngine]:
    return [VLLMServerEngine(**server), VLLMEngine(max_model_len=CONTEXT)]


def facts(model: Path, folder: Path, engine: RolloutEngine, **more: Any) -> dict[str, Any]:
    """What a run was trained on, as one rank sees it."""
    watch, (notes, found, data) = watched(model, folder, 2, engine, module_settings=SLOWLY, plan=plan(0, samples=16), **more)
    assert data.progress is not None
    return {
        "ids": notes.ids,
        "versions": notes.versions,
        "responses": [len(rollout) for rollout in watch.rollouts],
        "position": data.progress.rollouts.position,
        "weights": found,
    }


@pytest.mark.vllm
@pytest.mark.slow
def test_one_rank_and_two_in_process_and_by_server(elsewhere: dict[str, Any], tiny_model_path: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (port, tiny_model_path, tmp_path, elsewhere)
    torch.multiprocessing.spawn(_rank, arguments, nprocs=2)  # type: ignore[attr-defined]
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = [facts(tiny_model_path, tmp_path, engine) for engine in engines(elsewhere)]
    expected = alone[0]
    assert expected["versions"] == [(0, [0]), (1, [0]), (2, [2]), (3, [2])]
    assert expected["responses"] == [64] * 2
    assert expected["position"] == 8
    for name in ("ids", "versions", "responses", "position"):
        assert alone[1][name] == expected[name], name
    for first, second in zip(*by_rank, strict=True):
        assert first["position"] == second["position"] == expected["position"]
        # an update may leave one rank without a group that teaches
        pairs = zip(first["versions"], second["versions"], strict=True)
        assert [(step, ages or others) for (step, ages), (_, others) in pairs] == expected["versions"]
        assert [sum(both) for both in zip(first["responses"], second["responses"], strict=True)] == expected["responses"]
        assert [mine + other for mine, other in zip(first["ids"], second["ids"], strict=True)] == expected["ids"]
        assert same(first["weights"], second["weights"])


SERVER = "--data.engine=cppo_lightning.rollout.VLLMServerEngine"


@pytest.fixture
def folder(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a run of configs/debug.yaml, with a folder for temporary files."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path


@pytest.mark.parametrize(
    ("sign", "stuck", "ahead", "code"),
    [
        ("SIGINT", "starting 1", 0, 130),
        ("SIGTERM", "loading 1", 0, 143),
        ("SIGTERM", "sampling 2", 0, 143),
        ("SIGINT", "sampling 6", 1, 130),  # of the second rollout, with four problems in each
    ],
)
def test_a_signal_while_a_server_is_waited_for(
    stand_in: None, sign: str, stuck: str, ahead: int, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("MARK", mark)
    monkeypatch.setattr("cppo_lightning.rollout.ahead._STOP_SECONDS", SECONDS)  # for its thread, on a slow machine
    (folder / "stuck").write_text(stuck)
    sent: list[float] = []

    def send() -> None:
        if eventually((folder / "began").exists, 300):
            time.sleep(0.3)  # in the midst of waiting
            sent.append(time.monotonic())
            os.kill(os.getpid(), getattr(signal, sign))

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", DEBUG, "--trainer.callbacks=null", SERVER, f"--data.plan.max_staleness={ahead}"])
    seconds = time.monotonic() - sent[0]
    sender.join()
    assert "rollout ahead" not in [thread.name for thread in threading.enumerate()]
    assert end.value.code == code
    assert seconds < SECONDS
    assert ended(mark, 60), running(mark)
    assert list((folder / "temporary").iterdir()) == []


@pytest.mark.slow
def test_of_a_run_that_is_killed_nothing_stays(folder: Path) -> None:
    """Neither processes nor weights."""
    mark = uuid.uuid4().hex
    (folder / "stuck").write_text("sampling 2")
    code = (
        "import sys; from cppo_lightning.cli import main; from tests import fake_vllm_server\n"
        "fake_vllm_server.stand_in(); main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "fit", "--config", DEBUG, "--trainer.callbacks=null", SERVER]
    environment = {"MARK": mark, "TMPDIR": str(folder / "temporary"), "PYTHONPATH": str(Path(__file__).parents[1])}
    trainer = subprocess.Popen(command, env=os.environ | environment)
    try:
        assert eventually((folder / "began").exists, 300)
        assert list((folder / "temporary").glob("vllm-*/*/*.safetensors"))
    finally:
        trainer.kill()
        trainer.wait()
    assert ended(mark, 60), running(mark)
    assert not list((folder / "temporary").glob("vllm-*"))
