"""What is there to look at and to read: images and texts."""

from cppo_lightning.metric_dictionary.entries import Metric, Panel, Section, XAxis

PICTURES = Section(
    "Pictures and texts",
    (
        Panel(
            "Where the trust region acts",
            "image",
            XAxis.ROLLOUT_END,
            "TrustRegionFigures",
            (
                Metric(
                    "figures/divergence_by_position",
                    "Mean and largest tenth of the divergence D_t by token position in the last rollout, with the threshold "
                    "delta / w_t over them (paper, Figure 2).",
                    "none known. Where the largest tenth lies above the threshold, tokens are dropped.",
                ),
                Metric(
                    "figures/threshold_window",
                    "The stretch of tokens with the most dropped ones, each with what dropped it, its threshold and the "
                    "budget (paper, Figure 3).",
                ),
                Metric(
                    "figures/budget",
                    "Mean delta_b, and the share of the dropped tokens that the budget dropped, over the run (paper, Figure "
                    "7).",
                    "as `budget/delta_b` and `mask/by_budget`.",
                ),
                Metric(
                    "figures/mask_heat_map",
                    "Share of dropped tokens by position in the response and optimizer step; no picture if none was dropped.",
                ),
                Metric(
                    "figures/first_exhausted",
                    "Histogram of where in a response the budget first ran out, in the last rollout; no picture if it lasted.",
                    "as `budget/first_exhausted`.",
                ),
            ),
            kind="image",
        ),
        Panel(
            "Curves of all evaluations",
            "image",
            XAxis.EVALUATION,
            "EvalAccuracy, AIMEAccuracy",
            (
                Metric(
                    "eval/curves", "avg@k of every set over optimizer steps, with its interval (paper, Figure 4).", "rising."
                ),
            ),
            kind="image",
        ),
        Panel(
            "Samples to read",
            "text",
            XAxis.ROLLOUT,
            "TextSamples",
            (
                Metric(
                    "samples/<i>",
                    "A prompt and its response with the dropped tokens in brackets, the answer, verdict and reward.",
                    "answers that deserve their reward. If not, mend the verifier before training on.",
                ),
            ),
            kind="text",
        ),
        Panel(
            "What the run has to say",
            "text",
            XAxis.ONCE,
            "Explain",
            (
                Metric(
                    "explain/<rule>",
                    "What a rule saw in the metrics, what that means and what to try.",
                    "none but zero_loss, which says that a loss of 0 is by design.",
                ),
            ),
            kind="text",
        ),
    ),
)
