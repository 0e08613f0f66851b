"""The trainer's weights on their way to servers: a folder of safetensors that is there as a whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cppo_lightning.engines.checksums import checksum
from cppo_lightning.errors import RolloutError

SHARD_BYTES = 512 * 2**20
_MANIFEST = "manifest.json"


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, label: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``weights`` into ``folder``, as ``copied`` does."""
    deque(copied(weights, folder, label, shard_bytes), maxlen=0)


def copied(
    weights: Iterable[tuple[str, Tensor]], folder: Path, label: str, shard_bytes: int = SHARD_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Pass ``weights`` on, and write them into ``folder``, which appears in one step when all are on disk, with checksums.

    Besides the parameter in hand at most ``shard_bytes`` are held in memory, on the CPU.  What ``weights`` raises comes out,
    and leaves nothing behind.

    Raises:
        RolloutError: they cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    checksums: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    shards = 0
    try:
        partial.mkdir(parents=True)
        for name, tensor in weights:
            # a copy: the trainer may gather the next parameter into the same memory
            shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
            checksums[name] = checksum(shard[name])
            if sum(part.nbytes for part in shard.values()) >= shard_bytes:
                save_file(shard, partial / f"{shards:05d}.safetensors")
                shard, shards = {}, shards + 1
            yield name, tensor
            del tensor
        save_file(shard, partial / f"{shards:05d}.safetensors")
        (partial / _MANIFEST).write_text(json.dumps({"label": label, "checksums": checksums}))
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise RolloutError(f"the weights cannot be written into {str(folder)!r} (engine.weights_folder): {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class WeightFolder:
    """What ``write_weights`` wrote into ``folder`` under ``label``.

    Raises:
        RolloutError: the folder is not there, or of another label.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self._folder = folder
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
        except FileNotFoundError as error:
            raise RolloutError(
                f"there are no weights in {str(folder)!r} on this machine; engine.weights_folder should be a folder that "
                "trainer and servers see under the same path"
            ) from error
        if manifest["label"] != label:
            raise RolloutError(f"{str(folder)!r} holds the weights {manifest['label']!r}, not {label!r}")
        self._checksums: dict[str, int] = manifest["checksums"]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter, one at a time, compared with its checksum.

        Raises:
            RolloutError: a parameter is missing, or not as it was written.
        """
        left = dict(self._checksums)
        for file in sorted(self._folder.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118, safe_open is no mapping
                    tensor = stored.get_tensor(name)
                    if checksum(tensor) != left.pop(name, None):
                        raise RolloutError(f"{name!r} in {str(file)!r} is not what the trainer wrote")
                    yield name, tensor
        if left:
            raise RolloutError(f"{str(self._folder)!r} lacks {len(left)} parameters, the first {min(left)!r}")
