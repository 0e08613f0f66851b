"""``POST /cppo/generate``: samples of one prompt, with log-probabilities as arrays from the engine's core to the trainer.

Runs in a vLLM server alone, and imports vllm at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import GenerationError
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils import random_uuid
from vllm.v1.engine import output_processor
from vllm.v1.engine.logprobs import LogprobsProcessor

from cppo_lightning.engines.vllm.capture import LogProbs
from cppo_lightning.engines.vllm_server.answers import PATH, Answer

if TYPE_CHECKING:
    from fastapi import FastAPI


class Question(BaseModel):
    """Body of a request: a prompt, and vLLM's sampling parameters by name."""

    model_config = ConfigDict(extra="forbid")

    token_ids: list[Annotated[int, Field(ge=0)]]
    sampling_params: SamplingParams


class KeptAsArrays(LogprobsProcessor):
    """Leaves the log-probabilities of requests with ``flat_logprobs`` in arrays; of others vLLM makes what it always does."""

    @classmethod
    def from_new_request(cls, tokenizer: Any, request: Any) -> LogprobsProcessor:
        processor = super().from_new_request(tokenizer, request)
        if request.sampling_params.flat_logprobs:
            processor.logprobs = LogProbs(request.sampling_params.logprobs)  # pyright: ignore[reportAttributeAccessIssue]
        return processor

    def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
        if isinstance(self.logprobs, LogProbs):
            self.logprobs.add(logprobs_lists[0], logprobs_lists[1])
        else:
            super()._update_sample_logprobs(logprobs_lists)


@with_cancellation
async def generate(question: Question, raw_request: Request) -> Response:
    """The bytes of an :class:`Answer`; a client that goes away calls the request off.

    What vLLM raises is answered by its own handlers, as on its own routes.

    Raises:
        ValueError: the request does not say how many log-probabilities it wants.
        GenerationError: vLLM gave up on a sample; the request may be sent again.
    """
    params = question.sampling_params
    if params.logprobs is None or params.logprobs < 0:
        raise ValueError(f"sampling_params.logprobs should be the number of top log-probabilities, got {params.logprobs}")
    params.flat_logprobs, params.output_kind = True, RequestOutputKind.FINAL_ONLY
    engine = raw_request.app.state.engine_client
    # at the end of all samples, with all of them
    (result,) = [result async for result in engine.generate(tokens_input(question.token_ids), params, random_uuid())]
    samples = sorted(result.outputs, key=lambda sample: sample.index)
    if any(sample.finish_reason == "error" for sample in samples):
        raise GenerationError("vLLM ended a sample by an error")
    answer = Answer.of(
        [list(sample.token_ids) for sample in samples],
        [sample.finish_reason for sample in samples],
        [sample.logprobs for sample in samples],
        [span.version if span else "" for sample in samples for span in sample.weight_versions or [None]],
    )
    return Response(answer.to_bytes(), media_type="application/octet-stream")


def attach(app: FastAPI) -> None:
    """Give a vLLM server the route."""
    # of the class that makes Python numbers of log-probabilities vLLM has no other way to choose
    output_processor.LogprobsProcessor = KeptAsArrays  # pyright: ignore[reportPrivateImportUsage]
    app.add_api_route(PATH, generate, methods=["POST"], include_in_schema=False)
