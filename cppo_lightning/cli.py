"""The command line: ``python -m cppo_lightning {fit,validate,test,predict} --config ...``."""

from __future__ import annotations

import os
import sys


def main(args: list[str] | None = None) -> None:
    """Run one subcommand; settings that cannot work end with one line and exit code 2."""
    # a console script does not see the user's folder, where their own TrustRegion lies
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    # fork-parallel tokenizers deadlock or warn once verifier processes exist
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from cppo_lightning.errors import ConfigError, RolloutError

    try:
        _run(args)
    except ConfigError as error:
        sys.exit(_report("error", error, 2))
    except RolloutError as error:
        sys.exit(_report("stopped", error, 1))


def _report(kind: str, error: Exception, code: int) -> int:
    print(f"{kind}: {error}", file=sys.stderr)
    return code


def _run(args: list[str] | None) -> None:
    # heavy imports after argument-free work, so that a typo in the command itself is quick
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

    from cppo_lightning.datamodule import RolloutDataModule
    from cppo_lightning.module import RLVRModule

    class CPPOCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("model.policy.path", "data.model")
            parser.link_arguments("data.sampling.temperature", "model.temperature")
            # True asks Lightning to pick a seed later; the order of prompts stays reproducible all the same
            parser.link_arguments("seed_everything", "data.seed", compute_fn=lambda s: 0 if isinstance(s, bool) else s)
            parser.link_arguments("model", "data.top_k", compute_fn=lambda m: m.trust_region.top_k, apply_on="instantiate")

    cli_args: ArgsType = args
    cli = CPPOCLI(
        RLVRModule,
        RolloutDataModule,
        parser_kwargs={"parser_mode": "omegaconf"},
        seed_everything_default=1,
        auto_configure_optimizers=False,
        args=cli_args,
        run=True,
    )
    cli.datamodule.close()
