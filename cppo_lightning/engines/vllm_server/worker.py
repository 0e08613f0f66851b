"""What a vLLM server's workers run of this project: what they are, and the way in for new weights."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cppo_lightning.engines.vllm_server.transfer_backends  # noqa: F401, a worker finds a backend by its name, once it is registered
from cppo_lightning.engines.checksums import checksum
from cppo_lightning.engines.requests import checked_weights, meta_parameters, read_config
from cppo_lightning.engines.vllm.settings import end_reload, installed_version, repack_output_head
from cppo_lightning.engines.vllm_server.weight_folder import WeightFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


class TakesWeights:
    """Mixed into vLLM's worker by ``--worker-extension-cls``; /collective_rpc calls its methods with strings."""

    vllm_config: Any
    reload_weights: Callable[..., None]
    get_model: Callable[[], Any]
    finish_weight_update: Callable[[], None]
    weight_transfer_engine: Any
    _weight_update_active: bool

    def cppo_describe(self) -> dict[str, Any]:
        """What the trainer needs to know before it samples here."""
        config = self.vllm_config
        on_cpu = config.device_config.device_type == "cpu"
        return {
            "version": installed_version(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "logprobs_mode": config.model_config.logprobs_mode,
            "max_logprobs": config.model_config.max_logprobs,
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "weight_transfer": getattr(config.weight_transfer_config, "backend", None),
            # a CPU's random generator cannot be turned back, as vLLM 0.32 does for each piece of a prompt but the last
            "takes_seeds": not (on_cpu and config.scheduler_config.enable_chunked_prefill),
        }

    def cppo_load_weights(self, folder: str, label: str) -> dict[str, int]:
        """Take over the weights that the trainer wrote into ``folder``; each parameter's checksum in the model's dtype.

        Raises:
            RolloutError: the folder is not complete, or does not hold exactly this model's parameters.
        """
        received: dict[str, int] = {}
        model = self.vllm_config.model_config

        def read() -> Iterator[tuple[str, Tensor]]:
            parameters = meta_parameters(read_config(model.model))
            for name, tensor in checked_weights(WeightFolder(Path(folder), label).tensors(), parameters):
                received[name] = checksum(tensor.to(model.dtype))
                yield name, tensor

        self.cppo_abandon_update()
        try:
            self.reload_weights(weights_iterator=read())
        except BaseException:
            end_reload(self.get_model(), self.vllm_config)
            raise
        repack_output_head(self.get_model())
        return received

    def cppo_abandon_update(self) -> None:
        """End an update that was begun and not finished: half-loaded layers would count as loaded in the next one."""
        if self._weight_update_active:
            self.finish_weight_update()

    def cppo_received(self) -> dict[str, int]:
        """The checksum, as it came, of each parameter of the last update by vLLM's weight-transfer API.

        Raises:
            RolloutError: these were not exactly this model's parameters.
        """
        engine = self.weight_transfer_engine
        parameters = meta_parameters(read_config(self.vllm_config.model_config.model))
        deque(checked_weights(engine.received.items(), parameters), maxlen=0)
        return engine.checksums
