"""The comparison of trust regions: its grid, its sweep, and its commands."""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from rich.console import Console

from benchmarks.comparison import one_run, slips, sweep
from benchmarks.comparison.__main__ import PAGE, main, parser
from benchmarks.comparison.board import Board
from benchmarks.comparison.cost import Cost, Times, cost_of
from benchmarks.comparison.grid import REPOSITORY, STUDY, Run, load_study
from benchmarks.comparison.one_run import settings
from benchmarks.comparison.outcomes import Outcome, outcome, unpaired
from benchmarks.comparison.recorder import RunRecorder
from benchmarks.comparison.report import write_report
from benchmarks.comparison.results import EVALUATION, FINISHED, Part, Result, assemble, difference, read, write_run
from benchmarks.comparison.sweep import Sweep
from cppo_lightning.cli import main as command_line
from cppo_lightning.errors import ConfigError, RolloutError
from tests.documents import blocks_of, files_of
from tests.known_study import DECLARED, DEFINITIONS, SMALL, save, table_of
from tests.sweep_rig import results as results_in


def two_rollouts(folder: Path) -> Path:
    """The chain's config, of a size for tests; a digit and a comma are right, which an untrained model writes now and then."""
    config = OmegaConf.load(REPOSITORY / "configs" / "chain" / "chain_16.yaml")
    config.data.plan.update(prompts=8, updates=2)
    config.data.prompts.init_args.count = 64
    config.data.evaluation.prompts.init_args.count = 16
    config.data.verifier = {"class_path": "cppo_lightning.verifiers.Format", "init_args": {"pattern": "[0-9],"}}
    OmegaConf.save(config, folder / "two_rollouts.yaml")
    return folder / "two_rollouts.yaml"


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of one sweep that was left alone and of one that was killed and started again."""
    from cppo_lightning.chain_model import chain_model, chain_tokenizer

    folder = tmp_path_factory.mktemp("sweeps")
    study = {**SMALL, "tasks": {"chain": {**SMALL["tasks"]["chain"], "config": str(two_rollouts(folder))}}}
    tokenizer, file = chain_tokenizer(), save(study, folder)
    for saved in (tokenizer, chain_model(tokenizer, 16)):
        saved.save_pretrained(Sweep(load_study(file), folder, [0]).model("chain"))
    command = [sys.executable, "-m", "tests.sweep_rig", str(folder), str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    logs = [log.read_text() for log in folder.rglob("log.txt")]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])
    return folder


@pytest.mark.slow
class TestSweep:
    def test_a_kill_changes_no_byte(self, sweeps: Path) -> None:
        alone, killed = (sweeps / name / "results.parquet" for name in ("alone", "killed"))
        assert alone.read_bytes() == killed.read_bytes()

    def test_what_had_a_result_was_not_run_again(self, sweeps: Path) -> None:
        before, after = json.loads((sweeps / "before.json").read_text()), results_in(sweeps / "killed")
        assert 1 <= len(before) < len(after) == 4
        assert before.items() <= after.items()

    def test_methods_begin_with_the_same_weights_and_samples(self, sweeps: Path) -> None:
        results = read(sweeps / "alone" / "results.parquet")
        grpo, cppo = ({r.run.seed: r for r in results if r.run.method == method} for method in ("grpo", "cppo"))
        assert unpaired(results) == []
        for seed in (1, 2):
            assert grpo[seed].first_rollout == cppo[seed].first_rollout
            assert grpo[seed].evaluations[0] == cppo[seed].evaluations[0]
            assert str(difference(grpo[seed], cppo[seed])).startswith("from rollout 1 on: ")  # they are different methods
        assert grpo[1].initial_weights == grpo[2].initial_weights
        assert grpo[1].first_rollout != grpo[2].first_rollout

    def test_rows_are_rollouts(self, sweeps: Path) -> None:
        results = read(sweeps / "alone" / "results.parquet")
        assert [result.run for result in results] == load_study(sweeps / "study.yaml").runs()
        for result in results:
            assert result.status == FINISHED
            assert np.isfinite(result.curves[EVALUATION]).tolist() == [True, False, True]
            assert np.isfinite(result.curves["rollout/accuracy"]).tolist() == [True, True, False]
            assert result.curves["train/steps"][0] == 4
            assert np.isfinite(result.curves["budget/spent_mean"][0]) == (result.run.method == "cppo")

    def test_the_report_is_of_these_results(self, sweeps: Path, tmp_path: Path) -> None:
        study, results = load_study(sweeps / "study.yaml"), sweeps / "alone" / "results.parquet"
        (tmp_path / "comparison.md").write_text(PAGE.read_text())
        for name in ("comparison", "begun"):  # on the committed page, and on one that is begun
            written = write_report(study, results, tmp_path / f"{name}.md")
            page = (tmp_path / f"{name}.md").read_text()
            assert "### chain, learning rate 0.01, reuse 2" in page
            assert "All 4 declared runs are in" in page
            pictures = [f"{name}.png", *(f"{name}-chain-{n}.png" for n in ("accuracy", "masks", "budget"))]
            assert [file.name for file in written] == [f"{name}.md", *pictures]
            assert all(file.read_bytes()[:4] == b"\x89PNG" for file in written[1:])
            assert all(f"]({picture})" in page for picture in pictures)

    def test_results_are_equal_or_said_where_not(self, sweeps: Path) -> None:
        first, _, other, *_ = read(sweeps / "alone" / "results.parquet")
        assert difference(first, first) is None
        assert difference(first, other) == "began with other first rollout"
        curve = first.curves["train/entropy"].copy()
        curve[1] = np.nextafter(np.float32(curve[1]), np.float32(np.inf))
        changed = Result(
            first.run, first.status, first.initial_weights, first.first_rollout, {**first.curves, "train/entropy": curve}
        )
        assert str(difference(first, changed)).startswith("from rollout 2 on: train/entropy is")


def test_a_run_that_fails_is_a_result(tmp_path: Path) -> None:
    file, run = tmp_path / "run" / "result.parquet", Run("chain", "none", 1e-3, 1, 1)
    recorder = RunRecorder(str(file))
    recorder.rows[0] |= {EVALUATION: 0.5}

    class Trainer:
        default_root_dir = str(tmp_path)

    recorder.on_exception(Trainer(), None, KeyboardInterrupt())  # type: ignore[arg-type]
    assert not file.exists()
    recorder.on_exception(Trainer(), None, RolloutError(f"not finite; {tmp_path}/nonfinite has it"))  # type: ignore[arg-type]
    assemble([Part.load(run, "all", file)], tmp_path / "results.parquet")
    (result,) = read(tmp_path / "results.parquet")
    assert result.status == "not finite; ./nonfinite has it"
    assert outcome(result, DEFINITIONS) == Outcome(run, initial=0.5, best=0.5, final=0.0, collapsed=True, failure=result.status)
    recorder.rows.clear()  # before it had sampled anything
    recorder.on_exception(Trainer(), None, RolloutError("no log-probability"))  # type: ignore[arg-type]
    assemble([Part.load(run, "all", file)], tmp_path / "results.parquet")
    assert [(r.run, r.status) for r in read(tmp_path / "results.parquet")] == [(run, "no log-probability")]


class TestOneRun:
    def test_a_full_disk_is_not_kept_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the run has written is deleted before its times are, for which there may be no place."""
        study, place = load_study(save(SMALL, tmp_path)), one_run.Place(tmp_path / "run")

        def full(*_: Any) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(one_run, "main", full)
        monkeypatch.setattr(Times, "save", full)
        (core, *_), run = sorted(os.sched_getaffinity(0)), DECLARED[0]
        work = (study, run, tmp_path, place, core, os.getpid(), [])
        process = multiprocessing.get_context("fork").Process(target=one_run.carry_out, args=work)
        process.start()
        process.join()
        assert process.exitcode == 1
        assert "No space left on device" in place.log.read_text()
        assert not place.scratch.exists()


class TestBoard:
    def board(self, tmp_path: Path) -> tuple[Board, io.StringIO]:
        shown = io.StringIO()
        study = load_study(save(SMALL, tmp_path))
        return Board(study, 4, 2, Console(file=shown, force_terminal=True, width=200)), shown

    def test_a_run_that_failed_is_told(self, tmp_path: Path) -> None:
        """Although it has a result, and evaluations."""
        board, shown = self.board(tmp_path)
        sweep = Sweep(board.study, tmp_path / "folder", [0])
        with board:
            for run, status in zip(DECLARED, (FINISHED, "not finite"), strict=False):
                write_run(sweep.place(run).result, {"status": status}, {0: {EVALUATION: 0.6}})
                assert sweep._note(run, 1, board)
            board.show(DECLARED[2:])
        assert "chain/cppo/lr=0.01/reuse=2/seed=1 failed, which is its result: not finite" in shown.getvalue()
        assert "grpo 0.60 | cppo failed" in shown.getvalue()

    def test_runs_do_not_draw_the_bar_into_their_logs(self, tmp_path: Path) -> None:
        """They are forks, whose stdout is what it is here."""
        board, _ = self.board(tmp_path)
        before = sys.stdout, sys.stderr
        with board:
            assert (sys.stdout, sys.stderr) == before


class TestGrid:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda s: s["blocks"][0].update(methods=["cpo"]),
                "blocks[0].methods: 'cpo' is not one of grpo, cppo; did you mean cppo?",
            ),
            (
                lambda s: s["blocks"][0].update(tasks=["chains"]),
                "blocks[0].tasks: 'chains' is not one of chain; did you mean chain?",
            ),
            (
                lambda s: s["blocks"][0].update(seeds=[1, 1]),
                "blocks[0].seeds must list something, and nothing twice, got [1, 1]",
            ),
            (lambda s: s["blocks"][0].update(seeds=[]), "blocks[0].seeds must list something"),
            (
                lambda s: s["blocks"][0].update(learning_rates=[0.0]),
                "blocks[0].learning_rates must be above 0 and finite, got 0.0",
            ),
            (
                lambda s: s["blocks"][0].update(learning_rates=[float("inf")]),
                "blocks[0].learning_rates must be above 0 and finite, got inf",
            ),
            (lambda s: s["definitions"].update(stable_share=20), "definitions.stable_share is a share, from 0 to 1, got 20"),
            (lambda s: s["blocks"][0].update(reuse=[1]), "reuse"),
            (lambda s: s["methods"]["cppo"].update(preset="cpo"), "methods.cppo.preset: 'cpo' is not one of"),
            (lambda s: s["methods"]["cppo"].update(overrides={"delta": -1}), "methods.cppo: CPPO.delta must be above 0"),
            (lambda s: s["methods"]["cppo"].update(overrides={"dleta": 1}), "dleta"),
            (lambda s: s["tasks"]["chain"].update(config="configs/chains.yaml"), "tasks.chain.config: 'configs/chains.yaml'"),
            (lambda s: s["tasks"]["chain"].update(rollouts=0), "tasks.chain.rollouts must be at least 1, got 0"),
            (lambda s: s["definitions"].update(reference="dppo"), "definitions.reference: 'dppo' is not one of"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
        study = json.loads(json.dumps(SMALL))
        change(study)
        with pytest.raises(ConfigError) as error:
            load_study(save(study, tmp_path))
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"model: [", "cannot be read"),
            (b"\xff\xfe\x00\x80", "cannot be read"),
            (b"model: {trust_region: cppo_lightning.trust_regions.DPPO}", "has no model.trust_region with a class_path"),
            (b"trainer: {max_epochs: 1}", "has no model.trust_region with a class_path"),
        ],
    )
    def test_files_that_are_no_yaml_or_not_the_right_one(self, tmp_path: Path, text: bytes, message: str) -> None:
        """One line says which key names the file; a config of ``fit`` may say anything, as long as it is YAML."""
        own, study = tmp_path / "own.yaml", json.loads(json.dumps(SMALL))
        own.write_bytes(text)
        study["methods"]["cppo"] = {"preset": str(own)}
        with pytest.raises(ConfigError, match=rf"study\.yaml: methods\.cppo\.preset: '.*own\.yaml' {message}"):
            load_study(save(study, tmp_path))
        if message == "cannot be read":
            study = {**SMALL, "tasks": {"chain": {**SMALL["tasks"]["chain"], "config": str(own)}}}
            with pytest.raises(ConfigError, match=r"study\.yaml: tasks\.chain\.config: '.*own\.yaml' cannot be read"):
                load_study(save(study, tmp_path))
            with pytest.raises(ConfigError, match=r"own\.yaml' cannot be read"):
                load_study(own)

    def test_no_two_runs_have_one_name(self) -> None:
        """Results lie by it: rates that six digits do not tell apart are other runs."""
        near, round_ = (Run("chain", "cppo", rate, 2, 1) for rate in (3.1622776601683795e-05, 3.16228e-05))
        assert near.name != round_.name == "chain/cppo/lr=3.16228e-05/reuse=2/seed=1"

    def test_a_trust_region_of_ones_own(self, tmp_path: Path) -> None:
        """A path to a YAML file of it stands where the name of a shipped one does."""
        own = tmp_path / "own.yaml"
        own.write_text((REPOSITORY / "configs" / "trust_region" / "dppo.yaml").read_text())
        methods = {**SMALL["methods"], "own": {"preset": str(own)}, "dppo": {"preset": "dppo"}}
        study = load_study(save({**SMALL, "methods": methods}, tmp_path))
        mine, shipped = (settings(study, Run("chain", method, 1e-3, 2, 7), tmp_path) for method in ("own", "dppo"))
        assert mine == shipped
        with pytest.raises(ConfigError, match=r"methods\.own\.preset: '.*none\.yaml' is not one of"):
            load_study(save({**SMALL, "methods": {**methods, "own": {"preset": str(tmp_path / "none.yaml")}}}, tmp_path))

    def test_the_one_that_the_docs_add(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """To the committed study: five runs, in a cell that has others, and nothing else."""
        files = files_of(blocks_of((REPOSITORY / "README.md").read_text()))
        for name in ("drift_cap.py", "drift_cap.yaml"):
            (tmp_path / name).write_text(files[name])
        monkeypatch.syspath_prepend(tmp_path)
        page = (REPOSITORY / "docs" / "howto" / "own_trust_region.md").read_text()
        (added,) = [
            yaml.safe_load(text) for text in re.findall(r"```text\n(.*?)```", page, re.DOTALL) if text.startswith("methods:")
        ]
        added["methods"]["drift_cap"]["preset"] = str(tmp_path / added["methods"]["drift_cap"]["preset"])
        committed = yaml.safe_load(STUDY.read_text())
        study = {
            **committed,
            "methods": committed["methods"] | added["methods"],
            "blocks": [*committed["blocks"], *added["blocks"]],
        }
        before, after = load_study().runs(), load_study(save(study, tmp_path)).runs()
        assert after[: len(before)] == before
        assert [(run.method, run.seed) for run in after[len(before) :]] == [("drift_cap", seed) for seed in range(1, 6)]
        assert {run.cell for run in after[len(before) :]} <= {run.cell for run in before}

    def test_runs_are_the_blocks_products_each_once_and_seed_by_seed(self, tmp_path: Path) -> None:
        blocks = [SMALL["blocks"][0], {**SMALL["blocks"][0], "methods": ["cppo"], "seeds": [2, 3]}]
        study = load_study(save({**SMALL, "blocks": blocks}, tmp_path))
        assert [(run.method, run.seed) for run in study.runs()] == [
            ("grpo", 1),
            ("cppo", 1),
            ("grpo", 2),
            ("cppo", 2),
            ("cppo", 3),
        ]
        assert [run.seed for run in study.chosen(method=["cppo"], seed=None)] == [1, 2, 3]
        with pytest.raises(ConfigError, match="--seed: 4 is not one of"):
            study.chosen(seed=[4])
        with pytest.raises(ConfigError, match=r"--learning-rate: 0\.02 is not one of 0\.01"):
            study.chosen(learning_rate=[0.02])
        with pytest.raises(ConfigError, match=r"no run of the grid has --method \['grpo'\], --seed \[3\]"):
            study.chosen(method=["grpo"], seed=[3], reuse=None)

    def test_methods_of_a_seed_differ_in_the_trust_region_alone(self, tmp_path: Path) -> None:
        study = load_study(save(SMALL, tmp_path))
        grpo, cppo = (settings(study, Run("chain", method, 1e-3, 2, 7), tmp_path) for method in ("grpo", "cppo"))
        assert grpo["model"].pop("trust_region") != cppo["model"].pop("trust_region")
        assert grpo == cppo
        assert grpo["trainer"]["max_epochs"] == 2

    def test_the_study_is_the_papers_and_fits_its_time(self) -> None:
        study = load_study()
        table = {"none", "ppo", "grpo", "cispo", "minpro", "dppo", "trm_max", "trm_avg", "cppo"}
        assert {method.preset for method in study.methods.values()} >= table
        assert {run.method for run in study.runs()} == set(study.methods)
        # six hours on two cores
        assert sum(study.tasks[run.task].core_seconds for run in study.runs()) <= 6 * 3600 * 2


class TestCommands:
    @pytest.fixture
    def done(self, tmp_path: Path) -> Path:
        """A study's folder, in which the runs of the first seed have results."""
        save(SMALL, tmp_path)
        sweep = Sweep(load_study(tmp_path / "study.yaml"), tmp_path / "folder", [0])
        table_of(DECLARED[:2], tmp_path)
        for run in DECLARED[:2]:
            place = sweep.place(run)
            place.folder.mkdir(parents=True)
            (tmp_path / run.name / "result.parquet").rename(place.result)
            Times(50.0, 60.0, "a machine").save(place.times)
        return tmp_path

    def collect(self, done: Path, folder: str = "folder") -> int:
        to = ["--folder", str(done / folder), "--results", str(done / "collected.parquet")]
        return main(["collect", "--study", str(done / "study.yaml"), *to])

    def test_what_is_there_by_now_is_collected(self, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.collect(done) == 0
        assert "2 of 4 runs" in capsys.readouterr().out
        assert [result.run for result in read(done / "collected.parquet")] == DECLARED[:2]
        each = {run.name: 60.0 for run in DECLARED[:2]}
        assert cost_of(done / "collected.parquet") == Cost("a machine", len(os.sched_getaffinity(0)), {}, each)
        assert self.collect(done, "elsewhere") == 2
        assert "has no result of these runs" in capsys.readouterr().err

    def test_known_results_are_taken_over(self, done: Path) -> None:
        """In another folder they make the same table, and cost the same; what is made of something else is left."""
        study = load_study(done / "study.yaml")
        model = Sweep(study, done / "folder", [0]).model("chain")
        model.mkdir(parents=True)
        Times(None, 30.0, "a machine").save(model.with_suffix(".json"))
        self.collect(done)
        assert cost_of(done / "collected.parquet").models == {"chain": 30.0}
        before = [(done / f"collected.{ending}").read_bytes() for ending in ("parquet", "json")]
        again = Sweep(study, done / "again", [0])
        assert again.take_over(done / "collected.parquet") == 2
        assert again.take_over(done / "collected.parquet") == 0  # it has them
        assert self.collect(done, "again") == 0
        assert [(done / f"collected.{ending}").read_bytes() for ending in ("parquet", "json")] == before
        assert Sweep(study, done / "other", [0], ["--trainer.max_epochs=3"]).take_over(done / "collected.parquet") == 0

    def test_known_runs_are_not_run_again(self, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.collect(done)
        run = ["run", "--study", str(done / "study.yaml"), "--folder", str(done / "again"), "--seed", "1"]
        assert main([*run, "--known", str(done / "collected.parquet")]) == 0  # or it would fail to make the initial weights
        assert "collected.parquet: 2 results taken over" in capsys.readouterr().out
        assert (done / "again" / "results.parquet").read_bytes() == (done / "collected.parquet").read_bytes()

    def test_a_comment_in_a_config_makes_no_result_void(self, tmp_path: Path) -> None:
        config = tmp_path / "chain.yaml"
        config.write_text("trainer: {max_epochs: 2}\n")
        task = {**SMALL["tasks"]["chain"], "config": str(config)}
        study = load_study(save({**SMALL, "tasks": {"chain": task}}, tmp_path))
        places = []
        for text in ("trainer: {max_epochs: 2}\n", "# two\ntrainer:\n  max_epochs: 2\n", "trainer: {max_epochs: 3}\n"):
            config.write_text(text)
            places.append(Sweep(study, tmp_path, [0]).place(DECLARED[0]).folder)
        assert places[0] == places[1] != places[2]

    def test_initial_weights_are_of_what_the_study_says(self, tmp_path: Path) -> None:
        """In one folder, those that were made in another way are not taken: by other words, or by other settings in a file."""
        pretraining = tmp_path / "pretrain.yaml"

        def model(slip: float, *words: str) -> Path:
            pretraining.write_text(f"# how often\nslip: {slip}\n")
            task = {**SMALL["tasks"]["chain"], "model": ["maker", "--config", str(pretraining), *words]}
            return Sweep(load_study(save({**SMALL, "tasks": {"chain": task}}, tmp_path)), tmp_path, [0]).model("chain")

        assert model(0.1) == model(0.1)
        assert len({model(0.1), model(0.2), model(0.1, "--seed=1")}) == 3

    def test_a_folder_is_one_sweeps_and_runs_of_a_killed_one_may_take_a_moment_to_end(
        self, done: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.collect(done)
        again = Sweep(load_study(done / "study.yaml"), done / "again", [0])
        again.folder.mkdir()
        with (again.folder / ".lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with monkeypatch.context() as patch:
                patch.setattr(sweep, "_DYING", 0.0)
                with pytest.raises(ConfigError, match="again' is in use by a sweep that is under way"):
                    again.take_over(done / "collected.parquet")
            threading.Timer(0.5, fcntl.flock, (held, fcntl.LOCK_UN)).start()
            assert again.take_over(done / "collected.parquet") == 2

    def test_where_it_cannot_run_or_write_is_said_before_it_does(self, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
        study, file = ["--study", str(done / "study.yaml")], done / "file"
        file.write_text("")
        core = str(min(os.sched_getaffinity(0)))
        for options, message in (
            (["run", "--folder", str(file)], f"--folder {str(file)!r} cannot be written to"),
            (["run", "--folder", str(file / "in")], f"--folder {str(file / 'in')!r} cannot be written to"),
            (["run", "--folder", str(done / "new"), "--cores", "4096"], "--cores 4096: this process may use "),
            (["run", "--folder", str(done / "new"), "--cores", core, core], f"--cores {core}: this process may use "),
            (["collect", "--folder", str(done / "folder"), "--results", str(done)], f"{str(done)!r} cannot be written"),
        ):
            assert main([*options, *study]) == 2
            assert message in capsys.readouterr().err
        assert not (done / "new").exists()

    def test_documented_commands_are_understood(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Down to their runs, files and options of ``fit``, where they would begin to run for minutes."""
        pages = ("comparison.md", "comparison-probes.md", "howto/own_trust_region.md")
        docs = [(REPOSITORY / "docs" / name).read_text() for name in pages]
        commands = [shlex.split(line) for text in docs for line in re.findall(r"^python -m .*", text, re.MULTILINE)]
        assert len(commands) == 12
        for words in (words[3:] for words in commands if words[2] == "benchmarks.comparison"):
            options = parser().parse_args(words)
            if options.command == "run" and options.method != ["drift_cap"]:  # which a reader declares first
                runs = load_study(options.study).chosen(**{name: getattr(options, name) for name in Run._fields})
                assert not options.against or {run.name for run in runs} <= {
                    result.run.name for result in read(options.against)
                }
                parsed = ["--config", "configs/chain/chain_16.yaml", *options.options]
                with pytest.raises(SystemExit) as end:
                    command_line(["fit", *parsed, "--print_config"])
                assert end.value.code in (0, None)
        for words in (words[3:] for words in commands if words[2] == "cppo_lightning"):
            configs = [Path(words[i + 1]) for i, word in enumerate(words) if word == "--config"]
            assert words[0] in ("fit", "replay")
            assert configs
            assert all((REPOSITORY / config).is_file() for config in configs)
        for words in (words[3:] for words in commands if words[2] == "benchmarks.comparison.slips"):
            assert slips.parser().parse_args(words).rollouts == [0]
        capsys.readouterr()

    def test_what_there_is_nothing_to_compare_with_does_not_run(self, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = ["run", "--study", str(done / "study.yaml"), "--folder", str(done / "new"), "--against"]
        assert main([*run, str(done / "results.parquet")]) == 2
        said = capsys.readouterr().err
        assert "has no result of 2 of these 4 runs, the first of them chain/grpo/lr=0.01/reuse=2/seed=2" in said
        assert main([*run, str(done / "none.parquet")]) == 2
        assert "none.parquet' cannot be read" in capsys.readouterr().err
        assert not (done / "new").exists()
