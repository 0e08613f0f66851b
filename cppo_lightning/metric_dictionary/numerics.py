"""What engine and trainer disagree on at equal weights."""

from cppo_lightning.metric_dictionary.entries import Metric, Panel, Section, XAxis

_MISMATCH = "Mismatch"
_MISMATCH_OR_GAP = "Mismatch, LogProbGap"

NUMERICS = Section(
    "Engine against trainer",
    (
        Panel(
            "Gap of log-probabilities",
            "nats",
            XAxis.ROLLOUT,
            _MISMATCH_OR_GAP,
            (
                Metric(
                    "mismatch/logp_gap_mean",
                    "Absolute difference of the sampled tokens' log-probabilities between engine and trainer, mean.",
                    "measured with SmolLM2-135M: 5e-6 to 8e-6 in float32, 0.03 with a bfloat16 engine. `AnchorGuard` refuses "
                    "to start above 1e-4 and 0.1. If it grows over a run, the engine has other weights or another dtype.",
                ),
                Metric(
                    "mismatch/logp_gap_max",
                    "The largest such difference.",
                    "measured with SmolLM2-135M: up to 8e-5 in float32, 0.45 with a bfloat16 engine. `AnchorGuard` refuses "
                    "to start above 1e-3 and 3.",
                ),
            ),
        ),
        Panel(
            "Gap of probabilities",
            "probability",
            XAxis.ROLLOUT,
            _MISMATCH_OR_GAP,
            (
                Metric(
                    "mismatch/prob_gap_mean",
                    "Absolute difference of the sampled tokens' probabilities between engine and trainer, mean.",
                    "far below delta, which is in the same unit with `BinaryTV` and `TopKTV`; else take a float32 engine.",
                ),
                Metric("mismatch/prob_gap_max", "The largest such difference.", "below delta."),
            ),
        ),
        Panel(
            "Gap of log-probabilities by position",
            "nats",
            XAxis.ROLLOUT,
            _MISMATCH,
            (
                Metric(
                    "mismatch/logp_gap_at/<from>-<to>",
                    "Mean gap of log-probabilities in this slice of a response, in per cent of its own length.",
                    "none known. If it grows along a response, errors of the engine's cache add up.",
                ),
            ),
        ),
        Panel(
            "KL from numerics",
            "nats",
            XAxis.ROLLOUT,
            _MISMATCH,
            (
                Metric(
                    "mismatch/k3",
                    "Estimated KL(mu to pi) per token: mean of r - 1 - log r, with r = pi / mu.",
                    "near 0. No limit is known.",
                ),
            ),
        ),
        Panel(
            "Chi squared from numerics",
            "ratio",
            XAxis.ROLLOUT,
            _MISMATCH,
            (
                Metric("mismatch/chi2", "Estimated chi squared (pi against mu) per token: mean of (r - 1)^2.", "near 0."),
                Metric("mismatch/sequence_chi2", "The same with the ratio of a whole response."),
            ),
        ),
        Panel(
            "Effective share of the samples",
            "share",
            XAxis.ROLLOUT,
            _MISMATCH,
            (
                Metric(
                    "mismatch/ess",
                    "What share of the tokens as many drawn from the policy itself would be worth: 1 / (1 + chi squared).",
                    "near 1; measured with SmolLM2-135M: 1 in float32, .997 with a bfloat16 engine.",
                ),
                Metric(
                    "mismatch/sequence_ess",
                    "The same for whole responses, whose errors add up over their tokens.",
                    "near 1 in float32; .56 to .82 was measured with a bfloat16 engine. It falls with the length of responses.",
                ),
            ),
        ),
        Panel(
            "Probability that the top K captures",
            "probability",
            XAxis.ROLLOUT,
            _MISMATCH,
            (
                Metric(
                    "mismatch/captured_mass",
                    "Probability under mu of the top-K tokens that the trust region reads; only with a top-K divergence.",
                    "near 1: what is left is seen as one token. With K = 20, .88 to .98 was measured. If low, raise `k`.",
                ),
            ),
        ),
        Panel(
            "Divergence from numerics",
            "divergence",
            XAxis.ROLLOUT,
            _MISMATCH,
            (
                Metric(
                    "mismatch/divergence_mean",
                    "D_t that numerics alone make, mean over tokens; what `CPPO.noise` may be set to.",
                    "far below delta_b; measured with SmolLM2-135M: 2e-6 to 6e-6 in float32, .015 with a bfloat16 engine.",
                ),
                Metric("mismatch/divergence_max", "The largest such D_t.", "below delta."),
            ),
        ),
        Panel(
            "Limits spent by numerics",
            "ratio",
            XAxis.ROLLOUT,
            _MISMATCH,
            (
                Metric(
                    "mismatch/threshold_spent_mean",
                    "D_t over the token's threshold delta / w_t, mean over tokens.",
                    "far below 1; `Explain` speaks at 0.25. Measured with SmolLM2-135M: below 1e-4 in float32, .08 to .09 "
                    "with a bfloat16 engine.",
                ),
                Metric("mismatch/threshold_spent_max", "The same of the worst token.", "below 1, or numerics drop tokens."),
                Metric(
                    "mismatch/budget_spent_mean",
                    "Divergence of a whole response over its prefix budget, mean over responses. CPPO only.",
                    "far below 1.",
                ),
                Metric(
                    "mismatch/budget_spent_max",
                    "The same of the worst response. CPPO only.",
                    "below 1, or numerics drop tokens.",
                ),
                Metric(
                    "mismatch/budget_rate",
                    "Mean of D_t over delta_b: what `mismatch/budget_spent_mean` tends to in long responses. CPPO only.",
                    "far below 1; `Explain` speaks at 0.25. With a bfloat16 engine .70 to .77 was measured, which leaves "
                    "little to learn with: take a float32 engine, or set `CPPO.noise` to `mismatch/divergence_mean`.",
                ),
            ),
        ),
        Panel(
            "Dropped before any learning",
            "share",
            XAxis.ROLLOUT,
            _MISMATCH,
            (
                Metric(
                    "mismatch/masked",
                    "Tokens that the trust region drops for numerics alone.",
                    "0; up to .009 was measured with a bfloat16 engine. Else see the limits spent by numerics.",
                ),
            ),
        ),
        Panel(
            "Gap after handing over weights",
            "nats",
            XAxis.ROLLOUT,
            "WeightSyncCanary",
            (
                Metric(
                    "canary/logp_gap_mean",
                    "Gap of log-probabilities on fixed texts after a sync, mean over tokens, of the worst rank.",
                    "as `mismatch/logp_gap_mean`. The run stops above 1e-4 in float32 and 0.1 in bfloat16: the engine has "
                    "other weights than the trainer.",
                ),
                Metric(
                    "canary/logp_gap_max",
                    "The largest such gap.",
                    "as `mismatch/logp_gap_max`. The run stops above 1e-3 in float32 and 3 in bfloat16.",
                ),
            ),
        ),
    ),
)
