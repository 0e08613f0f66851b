"""The command line: ``python -m cppo_lightning {fit,validate,test,predict} --config ...``, and commands on what they leave."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from contextlib import ExitStack
from typing import Any, cast

from cppo_lightning.interrupts import INTERRUPTS

# Lightning's remarks on what is meant to be so here: (part of the message, why it is)
EXPECTED_WARNINGS = (
    "Total length of `list` across ranks is zero",  # evaluation during fit is up to callbacks
    "your dataloader is not resumable",  # the datamodule restores the rest of a rollout
    "isinstance\\(treespec, LeafSpec\\)",  # Lightning's own use of torch
)

# subcommands that are none of the Trainer's: the module whose main takes what stands after the name
_OTHER_COMMANDS = {
    "export": "cppo_lightning.export",
    "replay": "cppo_lightning.replay.command",
    "resume-check": "cppo_lightning.resume_check",
}


def main(args: list[str] | None = None) -> None:
    """Run one subcommand.

    Settings that cannot work end it with one line and exit code 2, unusable rollouts with 1, Ctrl-C with 130 and SIGTERM with
    143.  However it ends, it leaves no process behind.
    """
    # a console script does not see the user's folder, where their own TrustRegion lies
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    # tokenizers' threads do not survive the forks of other libraries, and prompts are short
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")

    from omegaconf.errors import OmegaConfBaseException

    from cppo_lightning.errors import ConfigError, RolloutError

    try:
        with INTERRUPTS.handled():
            _run(args)
    except OmegaConfBaseException as error:
        _end("error", ConfigError(f"{str(error).splitlines()[0]} (interpolations see the keys of their own file only)"), 2)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__  # the parser wraps what optional settings raise
        if cause is None:
            from cppo_lightning.parser import said_by_classes

            if not (said := said_by_classes(str(error))):
                raise
            cause = ConfigError(said)
        _end("error", cause, 2)
    except RolloutError as error:
        _end("stopped", error, 1)
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning ends an interrupted run with the exit code 1
        interrupt = end.__context__ if isinstance(end, SystemExit) else end
        if not isinstance(interrupt, KeyboardInterrupt):
            raise
        received = INTERRUPTS.received or signal.SIGINT
        interrupt.args = (f"interrupted by {received.name}",)  # also where it was raised by other means
        _end("stopped", interrupt, 128 + received)


def _end(kind: str, error: BaseException, code: int) -> None:
    # such as where FailureCheckpoint has saved the run
    print(f"{kind}: {'; '.join([str(error), *getattr(error, '__notes__', ())])}", file=sys.stderr)
    sys.exit(code)


def _run(args: list[str] | None) -> None:
    command, *rest = args or sys.argv[1:] or [""]
    if command in _OTHER_COMMANDS:
        importlib.import_module(_OTHER_COMMANDS[command]).main(rest)
    else:
        _run_trainer(args)


def _run_trainer(args: list[str] | None) -> None:
    import logging

    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from transformers.utils import logging as transformers_logging

    from cppo_lightning.callbacks import EvaluationReport, FailureCheckpoint, PredictionWriter, Shutdown
    from cppo_lightning.datamodule import RolloutDataModule
    from cppo_lightning.errors import ConfigError
    from cppo_lightning.module import RLVRModule
    from cppo_lightning.parser import DryRun, Parser
    from cppo_lightning.preflight import check_before_loading, preflight
    from cppo_lightning.resume import check_goes_on, checkpoint_path
    from cppo_lightning.untrusted import check_checkpoint

    class CPPOCLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            # how a checkpoint is read is no setting
            return {name: hidden | {"weights_only"} for name, hidden in LightningCLI.subcommands().items()}

        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            others = f"Further commands, each with a --help of its own: {', '.join(_OTHER_COMMANDS)}"
            return super().init_parser(**{**kwargs, "prog": "python -m cppo_lightning", "epilog": others})

        def setup_parser(self, *args: Any, **kwargs: Any) -> None:
            super().setup_parser(*args, **kwargs)
            self._subcommand_parsers["fit"].add_argument("--dry_run", action=DryRun)

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("model.policy.path", "data.model")
            parser.link_arguments("data.sampling.temperature", "model.temperature")
            # True asks Lightning to pick a seed later; the order of prompts stays reproducible all the same
            parser.link_arguments("seed_everything", "data.seed", compute_fn=lambda s: 0 if isinstance(s, bool) else s)
            parser.link_arguments("model", "data.top_k", compute_fn=lambda m: m.trust_region.top_k, apply_on="instantiate")

        def _parse_ckpt_path(self) -> None:
            # Lightning's would let hyper-parameters found in the file override the run's YAML
            path = self.config[self.config.subcommand].ckpt_path
            if path is not None:
                check_checkpoint(path)

        def _set_seed(self) -> None:
            try:
                super()._set_seed()
            except ValueError as error:  # Lightning's
                raise ConfigError(f"seed_everything: {error}") from error

        def after_instantiate_classes(self) -> None:
            at_the_end.callback(self.datamodule.close)
            subcommand = str(self.subcommand)
            check_before_loading(self.trainer, self.model, trains=subcommand == "fit")
            run = self.config_init[subcommand]
            if run.ckpt_path is not None:
                run.ckpt_path = checkpoint_path(self.trainer, subcommand, run.ckpt_path)
            if run.ckpt_path is not None and subcommand == "fit":
                checkpoint = check_checkpoint(run.ckpt_path)
                check_goes_on(run.ckpt_path, checkpoint)
                self.datamodule.expect(checkpoint)

        def before_instantiate_classes(self) -> None:
            self.dry_run = cast("Parser", self._subcommand_parsers["fit"]).dry_run
            if self.dry_run:
                self.save_config_callback = None

        def _run_subcommand(self, subcommand: str) -> None:
            if self.dry_run:
                preflight(self.trainer, self.model, self.datamodule)
            else:
                super()._run_subcommand(subcommand)

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            try:
                trainer = super().instantiate_trainer(**kwargs)
            # devices that are none or not there (TypeError: a number of them that is none), a strategy that is none
            except (MisconfigurationException, TypeError, ValueError) as error:
                raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
            if self.dry_run:
                return trainer  # what ends a run, or saves it, has nothing to do
            callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
            results = {"validate": EvaluationReport, "test": EvaluationReport, "predict": PredictionWriter}
            writer = results.get(str(self.subcommand))
            if writer is not None and not any(isinstance(c, writer) for c in callbacks):
                callbacks.append(writer())
            if trainer.checkpoint_callbacks and not any(isinstance(c, FailureCheckpoint) for c in callbacks):
                callbacks.append(FailureCheckpoint())
            callbacks.append(Shutdown())
            return trainer

    transformers_logging.disable_progress_bar()
    for library in ("lightning.pytorch", "lightning.fabric"):  # hardware reports and product tips
        logging.getLogger(library).setLevel(logging.WARNING)
    with ExitStack() as at_the_end:
        CPPOCLI(
            RLVRModule,
            RolloutDataModule,
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf"},
            seed_everything_default=1,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},  # a run may go on in its folder
            args=args,
        )
