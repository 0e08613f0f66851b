"""The command line: ``python -m cppo_lightning {fit,validate,test,predict} --config ...``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

# Lightning's remarks on what is meant to be so here: (part of the message, why it is)
EXPECTED_WARNINGS = (
    "Your `IterableDataset` has `__len__` defined",  # without one a rollout would be prefetched, from weights one step old
    "Total length of `list` across ranks is zero",  # evaluation during fit is up to callbacks
    "does not have many workers",  # the rollout stream lives in this process, beside the weights
    "isinstance\\(treespec, LeafSpec\\)",  # Lightning's own use of torch
)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which so gets the shutdown that Lightning gives to Ctrl-C, at once and not after the running rollout."""


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
        with _terminable():
            _run(args)
    except OmegaConfBaseException as error:
        _end("error", ConfigError(f"{str(error).splitlines()[0]} (interpolations see the keys of their own file only)"), 2)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__  # the parser wraps what optional settings raise
        if cause is None:
            raise
        _end("error", cause, 2)
    except RolloutError as error:
        _end("stopped", error, 1)
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning ends an interrupted run with the exit code 1
        interrupt = end.__context__ if isinstance(end, SystemExit) else end
        if not isinstance(interrupt, KeyboardInterrupt):
            raise
        received = signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT
        _end("stopped", f"interrupted by {received.name}", 128 + received)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises :class:`_Terminated`; the signals' handlers are as before afterwards."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return

    def terminate(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would cut the shutdown short
        raise _Terminated

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(kind: str, error: BaseException | str, code: int) -> None:
    # such as where FailureCheckpoint has saved the run
    print(f"{kind}: {'; '.join([str(error), *getattr(error, '__notes__', ())])}", file=sys.stderr)
    sys.exit(code)


def _run(args: list[str] | None) -> None:
    import logging

    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from transformers.utils import logging as transformers_logging

    from cppo_lightning.callbacks import PredictionWriter
    from cppo_lightning.datamodule import RolloutDataModule
    from cppo_lightning.module import RLVRModule
    from cppo_lightning.untrusted import check_checkpoint

    class CPPOCLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            # how a checkpoint is read is no setting
            return {name: hidden | {"weights_only"} for name, hidden in LightningCLI.subcommands().items()}

        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            parser = super().init_parser(**{**kwargs, "prog": "python -m cppo_lightning"})
            parser.allow_abbrev = False  # a key cut short is a misspelt key
            # an error names its key; 200 lines of usage before it would bury that
            parser.print_usage = lambda file=None: None
            return parser

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

        def after_instantiate_classes(self) -> None:
            at_the_end.callback(self.datamodule.close)

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            if self.subcommand == "predict" and not any(isinstance(c, PredictionWriter) for c in trainer.callbacks):  # pyright: ignore[reportAttributeAccessIssue]
                trainer.callbacks.append(PredictionWriter())  # pyright: ignore[reportAttributeAccessIssue]
            return trainer

    transformers_logging.disable_progress_bar()
    for library in ("lightning.pytorch", "lightning.fabric"):  # hardware reports and product tips
        logging.getLogger(library).setLevel(logging.WARNING)
    with ExitStack() as at_the_end:
        CPPOCLI(
            RLVRModule,
            RolloutDataModule,
            parser_kwargs={"parser_mode": "omegaconf"},
            seed_everything_default=1,
            auto_configure_optimizers=False,
            args=args,
        )
