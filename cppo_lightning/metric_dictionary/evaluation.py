"""How good the policy is on problems that it is not trained on."""

from cppo_lightning.metric_dictionary.entries import Metric, Panel, Section, XAxis

_CALLBACKS = "EvalAccuracy, AIMEAccuracy, EvaluationReport"
_MEAN = "Unweighted mean over sets of"

EVALUATION = Section(
    "Evaluation",
    (
        Panel(
            "avg@k",
            "share",
            XAxis.EVALUATION,
            _CALLBACKS,
            (
                Metric(
                    "eval/avg@<k>",
                    f"{_MEAN} the accuracy over k samples per problem.",
                    "rising. The paper's best over AIME 2024 to 2026 (k = 16) are .1278 for Qwen3-1.7B-Base, .3188 for "
                    "Qwen3-1.7B and .3111 for Qwen3-8B-Base. A change within the interval may be chance.",
                    interval=True,
                ),
                Metric(
                    "eval/<set>/avg@<k>",
                    "Accuracy over k samples per problem.",
                    "rising, as `eval/avg@<k>`.",
                    interval=True,
                ),
            ),
        ),
        Panel(
            "pass@k",
            "share",
            XAxis.EVALUATION,
            _CALLBACKS,
            (
                Metric("eval/pass@<k>", f"{_MEAN} pass@k, for the k that is sampled.", interval=True),
                Metric(
                    "eval/<set>/pass@<k>",
                    "Unbiased estimate of the probability that at least one of k samples is correct, for powers of two up to "
                    "the number of samples, and that number.",
                    "none known. If it falls while avg@k rises, the policy gives up variety for certainty.",
                    interval=True,
                ),
            ),
        ),
        Panel(
            "maj@k",
            "share",
            XAxis.EVALUATION,
            _CALLBACKS,
            (
                Metric("eval/maj@<k>", f"{_MEAN} maj@k.", interval=True),
                Metric(
                    "eval/<set>/maj@<k>",
                    "Problems whose most frequent answer among k samples is correct; only if the verifier says what it read.",
                    "above avg@k where the model knows more than it shows in one sample.",
                    interval=True,
                ),
            ),
        ),
        Panel(
            "Answers without a fair chance",
            "share",
            XAxis.EVALUATION,
            _CALLBACKS,
            (
                Metric(
                    "eval/<set>/truncated_share",
                    "Responses that were cut off by the length limit.",
                    "near 0; else raise `max_tokens`, as scores measure the limit.",
                ),
                Metric(
                    "eval/<set>/unparseable_share",
                    "Responses in which the verifier found no answer.",
                    "near 0; else ask for the form that the verifier reads, in `data.template`.",
                ),
            ),
        ),
        Panel(
            "Time for an evaluation",
            "s",
            XAxis.EVALUATION,
            "EvalAccuracy, AIMEAccuracy",
            (
                Metric(
                    "eval/seconds",
                    "The whole evaluation.",
                    "small beside the rollouts between two; else raise `every_n_rollouts`.",
                ),
            ),
        ),
        Panel(
            "Commands validate and test",
            "share",
            XAxis.COMMAND,
            "RLVRModule",
            (
                Metric("<stage>/accuracy", "Responses judged correct, with `data.evaluation`; `<stage>` is val or test."),
                Metric("<stage>/truncated_share", "Responses that were cut off by the length limit.", "near 0."),
            ),
        ),
        Panel(
            "Reward in validate and test",
            "reward",
            XAxis.COMMAND,
            "RLVRModule",
            (Metric("<stage>/reward", "Mean reward of the responses."),),
        ),
    ),
)
