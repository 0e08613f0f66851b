"""Settings that each could be right and do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cppo_lightning.engines.engine import RolloutEngine, Sampling
    from cppo_lightning.mismatch import Anchor
    from cppo_lightning.rollout.stream import RolloutPlan
    from cppo_lightning.verifiers.overlong import Overlong


def check_settings(plan: RolloutPlan, sampling: Sampling, overlong: Overlong | None, engine: RolloutEngine, top_k: int) -> None:
    """What a datamodule can see of itself.

    Raises:
        ConfigError: sampling that biases every ratio, or what the engine or a response's length cannot give.
    """
    if sampling.truncated:
        raise ConfigError(
            f"data.sampling is truncated (top_p {sampling.top_p}, top_k {sampling.top_k}, min_p {sampling.min_p}): mu "
            "would be renormalised over the kept tokens and every ratio biased; train with top_p 1, top_k 0, min_p 0"
        )
    if sampling.temperature == 0:
        raise ConfigError("data.sampling.temperature must be above 0 to train on, got 0; the paper uses 1.0")
    if overlong is not None and overlong.max_tokens > sampling.max_tokens:
        raise ConfigError(
            f"data.overlong.max_tokens = {overlong.max_tokens} is more than data.sampling.max_tokens = "
            f"{sampling.max_tokens}, so no response would get the full penalty; take at most {sampling.max_tokens}"
        )
    limit = engine.max_top_logprobs
    if limit is not None and top_k > limit:
        raise ConfigError(
            f"the trust region reads the top {top_k} tokens, but {type(engine).__name__} returns at most {limit}; "
            f"raise data.engine's max_top_logprobs or lower the divergence's k to {limit}"
        )
    if plan.max_staleness and not engine.concurrent:
        raise ConfigError(
            f"data.plan.max_staleness = {plan.max_staleness} draws a rollout while another is trained on, which "
            f"{type(engine).__name__} cannot do; take TransformersEngine or VLLMServerEngine, or max_staleness 0"
        )


def check_same_data(saved: str, fingerprint: str, allow_other_data: bool) -> None:
    """Compare a checkpoint's problems with those at hand.

    Raises:
        ConfigError: they are others, which nobody has allowed.
    """
    if saved != fingerprint and not allow_other_data:
        raise ConfigError(
            f"the checkpoint was trained on problems with the fingerprint {saved}, these have {fingerprint}: restore "
            "data.prompts, data.template and what drops problems, or set data.allow_other_data: true to go on with these"
        )


def check_same_on_ranks(fingerprints: Sequence[str]) -> None:
    """Compare what each rank has read, by rank.

    Raises:
        ConfigError: one has read other problems than the first, so that their shares would overlap and leave problems out.
    """
    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise ConfigError(
                f"data.prompts: the problems on rank {rank} have the fingerprint {fingerprint}, those on rank 0 "
                f"{fingerprints[0]}; give every rank the same files, template and tokenizer"
            )


def drawn_with(plan: RolloutPlan, sampling: Sampling, top_k: int, seed: int, fingerprint: str) -> dict[str, float | str]:
    """What a rollout, and how old its samples may be, depends on besides weights: one that was drawn ahead with other settings,
    or of problems with another fingerprint, is of no use."""
    of_plan = {name: getattr(plan, name) for name in ("prompts", "samples", "max_refills", "max_staleness", "steps")}
    of_sampling = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_k": top_k, "seed": seed}
    return {**of_plan, **of_sampling, "fingerprint": fingerprint}


def check_training(plan: RolloutPlan, ranks: int, anchor: Anchor) -> None:
    """What shows when there are ranks and a module.

    Raises:
        ConfigError: prompts that do not divide into updates and ranks, or an anchor that is gone when it is needed.
    """
    parts = plan.updates * ranks
    if plan.prompts % parts:
        raise ConfigError(
            f"data.plan.prompts = {plan.prompts} does not divide into {plan.updates} updates on {ranks} ranks; "
            f"take a multiple of {parts}"
        )
    if plan.max_staleness and anchor == "recomputed":
        raise ConfigError(
            f"data.plan.max_staleness = {plan.max_staleness} does not go with model.anchor = recomputed: the policy has "
            "moved on from the weights that sampled, which should score the samples; take max_staleness 0 or the anchor rollout"
        )
