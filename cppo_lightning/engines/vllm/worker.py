"""What a vLLM server runs of this project: a guard before every route, and the way in for new weights."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo_lightning.engines.checksums import checksum
from cppo_lightning.engines.requests import checked_weights, meta_parameters, read_config
from cppo_lightning.engines.vllm.settings import repack_output_head
from cppo_lightning.engines.vllm.weight_folder import WeightFolder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from torch import Tensor


class RequireKey:
    """ASGI middleware: a request on any route needs ``Authorization: Bearer`` with the server's ``VLLM_API_KEY``.

    vLLM's own check covers the routes under /v1 and /inference alone, not those that change weights.

    Raises:
        RuntimeError: the server has no key.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise RuntimeError("set VLLM_API_KEY: this server answers only those who know it")
        self._app = app
        self._expected = hashlib.sha256(b"Bearer " + key.encode()).digest()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan" or self._knows_key(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = b'{"error": "this server needs its API key"}'
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _knows_key(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = b"".join(value for name, value in headers if name.lower() == b"authorization")
        # digests of one length: the time taken tells nothing about the key
        return hmac.compare_digest(hashlib.sha256(given).digest(), self._expected)


class WeightsFromFolder:
    """Mixed into vLLM's worker by ``--worker-extension-cls``; /collective_rpc calls its methods with strings."""

    vllm_config: Any
    reload_weights: Callable[..., None]
    get_model: Callable[[], Any]

    def cppo_describe(self) -> dict[str, Any]:
        """What the trainer needs to know before it samples here."""
        config = self.vllm_config
        on_cpu = config.device_config.device_type == "cpu"
        return {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "logprobs_mode": config.model_config.logprobs_mode,
            "max_logprobs": config.model_config.max_logprobs,
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
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

        self.reload_weights(weights_iterator=read())
        repack_output_head(self.get_model())
        return received
