"""``python -m cppo_lightning export``: from a checkpoint to a folder that transformers and vLLM load."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from cppo_lightning.engines.requests import eos_token_ids, generation_config, read_config
from cppo_lightning.errors import ConfigError
from cppo_lightning.model_card import last_metrics, model_card
from cppo_lightning.policy import Policy
from cppo_lightning.policy_config import DType, PolicyConfig
from cppo_lightning.replacing import put, standing
from cppo_lightning.replay.regions import made_from
from cppo_lightning.strategies.sharded_checkpoint import WEIGHTS
from cppo_lightning.untrusted import META, UNFINISHED, check_checkpoint, check_no_code, refusing

if TYPE_CHECKING:
    from torch import Tensor

_FILE_SIZE = "5GB"  # of weights, at most
_OURS = "policy."  # RLVRModule's name for the policy


def main(args: Sequence[str] | None = None) -> None:
    """The command; ``--help`` says what it takes."""
    from transformers.utils.logging import disable_progress_bar

    parser = argparse.ArgumentParser("python -m cppo_lightning export", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a file, or the folder of a sharded one")
    parser.add_argument("output", type=Path, help="folder to be made")
    parser.add_argument("--config", type=Path, help="the run's config.yaml; without it, the one above the checkpoint")
    parser.add_argument(
        "--dtype", choices=get_args(DType), help="of the exported weights; without it, that of the trained ones"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if there is one")
    given = parser.parse_args(args)
    disable_progress_bar()
    export(**vars(given))
    print(f"exported to {given.output}")


def export(
    checkpoint: Path, output: Path, config: Path | None = None, dtype: DType | None = None, overwrite: bool = False
) -> None:
    """Write the policy in ``checkpoint`` as a Hugging Face folder, with tokenizer, generation config and model card.

    The folder appears when it is whole.  Nothing is unpickled but tensors and plain values, and no code of a model is run.  The
    model's type, its tokenizer and the tokens that end a response are those of the run's ``model.policy.path``; adapters are
    merged into its weights, and tied ones are written once.  It takes the memory of one copy of the trained weights, and of one
    in ``dtype`` if that is another.

    Args:
        checkpoint: a file, or the folder of a sharded one.
        output: folder to be made.
        config: the run's ``config.yaml``; None for the one beside the checkpoint or in a folder above.
        dtype: of the exported weights; None for that of the trained ones.
        overwrite: replace ``output`` if it is there.

    Raises:
        ConfigError: ``output`` is there, ``checkpoint`` or ``config`` cannot be read, or they do not belong together.
    """
    if output.exists() and not overwrite:
        raise ConfigError(f"output {str(output)!r} is there already; give another name, or --overwrite to replace it")
    checkpoint = Path(standing(checkpoint))
    file = config or _config_above(checkpoint)
    run = _read(file)
    trained = made_from(run["model"]["policy"], PolicyConfig, f"config {str(file)!r}: model.policy")
    trained = trained.under(run.get("trainer", {}).get("precision"))
    check_no_code(trained.path)
    held = check_checkpoint(str(checkpoint))
    policy = Policy.load(replace(trained, attn_implementation="eager"))  # the run's may need its GPU
    _fill(policy, checkpoint)
    dtype = dtype or trained.dtype
    unfinished = output.absolute().with_name(f".{output.name}{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    try:
        _write(unfinished, policy, trained.path, getattr(torch, dtype), run["data"]["sampling"]["temperature"])
        steps, versions = held["global_step"], held.get("RolloutDataModule", {}).get("versions", {})
        card = model_card(output.name, run, dtype, steps, versions, last_metrics(file.parent, steps))
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        put(unfinished, output.absolute())
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _config_above(checkpoint: Path) -> Path:
    for folder in list(checkpoint.absolute().parents)[:2]:
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise ConfigError(
        f"checkpoint {str(checkpoint)!r} has no config.yaml beside it or in the folder above; give the run's with --config"
    )


def _read(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    try:
        run: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
        for part, key in (("model", "policy"), ("model", "trust_region"), ("data", "sampling")):
            if not isinstance(run[part][key], dict):
                raise TypeError(f"{part}.{key} has no keys")
    except (OSError, KeyError, TypeError) as error:
        raise ConfigError(f"config {str(file)!r} should be the config.yaml of a fit: {error!r}") from error
    return run


@torch.no_grad()
def _fill(policy: Policy, checkpoint: Path) -> None:
    """Copy the checkpoint's weights into ``policy``; frozen ones need not be in it."""
    ours = {f"{_OURS}{name}": tensor for name, tensor in policy.state_dict(keep_vars=True).items()}
    sharded = checkpoint.is_dir()
    with refusing(checkpoint):
        file = checkpoint / META if sharded else checkpoint
        whole: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        shapes = {name: tensor.shape for name, tensor in whole.items()} | (_shard_shapes(checkpoint) if sharded else {})
    theirs = {name: shape for name, shape in shapes.items() if name.startswith(_OURS)}
    wrong = [name for name, shape in theirs.items() if name not in ours or ours[name].shape != shape]
    trained = [f"{_OURS}{name}" for name, parameter in policy.named_parameters() if parameter.requires_grad]  # tied ones once
    if wrong or (wrong := [name for name in trained if name not in theirs]):
        raise ConfigError(
            f"checkpoint {str(checkpoint)!r} is of another model than the configuration's model.policy, by {wrong[0]} for one"
        )
    with refusing(checkpoint):
        for name in theirs.keys() & whole.keys():
            ours[name].copy_(whole[name])
        if sharded:
            _read_shards(checkpoint, {name: ours[name] for name in theirs.keys() - whole.keys()})


def _shard_shapes(folder: Path) -> dict[str, torch.Size]:
    """Of the module's tensors in a sharded checkpoint's files."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    held: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name.removeprefix(WEIGHTS): tensor.size for name, tensor in held.items() if name.startswith(WEIGHTS)}


def _read_shards(folder: Path, into: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors = {f"{WEIGHTS}{name}": tensor.data for name, tensor in into.items()}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


@torch.no_grad()
def _write(folder: Path, policy: Policy, base: str, dtype: torch.dtype, temperature: float) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = read_config(base)
    with torch.device("meta"):  # transformers has to know names and kind alone: the weights are given
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    generation = generation_config(base, config)
    generation.update(do_sample=True, temperature=temperature, top_p=1.0, top_k=0, min_p=None)
    generation.eos_token_id = eos_token_ids(base, config)
    generation._from_model_config = False  # else transformers may replace it by what follows from the model's
    model.generation_config = generation
    weights = {name: tensor.to(dtype) for name, tensor in policy.named_weights()}
    model.save_pretrained(folder, state_dict=weights, max_shard_size=_FILE_SIZE)
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(folder)
