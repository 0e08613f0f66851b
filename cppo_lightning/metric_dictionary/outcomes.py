"""What was sampled and what it was worth, and the problems themselves."""

from cppo_lightning.metric_dictionary.entries import Metric, Panel, Section, XAxis

ROLLOUTS = Section(
    "Rollouts",
    (
        Panel(
            "Reward",
            "reward",
            XAxis.ROLLOUT,
            "RolloutMetrics",
            (
                Metric(
                    "rollout/reward",
                    "Mean reward of the sampled responses, as the verifier gives it, without `data.overlong`.",
                    "rising over tens of rollouts, with noise from rollout to rollout. Flat: see `rollout/zero_spread_share`.",
                ),
                Metric(
                    "rollout/reward/<part>",
                    "Mean of one part of the reward, before weighting; only with `WeightedSum`.",
                    "rising with `rollout/reward`. If the form's part rises and the answer's does not, lower the form's "
                    "weight.",
                ),
            ),
        ),
        Panel(
            "Accuracy on training problems",
            "share",
            XAxis.ROLLOUT,
            "RolloutMetrics",
            (
                Metric(
                    "rollout/accuracy",
                    "Responses judged correct.",
                    "rising. At 0 or 1 groups have equal rewards, and nothing is learned.",
                ),
                Metric("rollout/accuracy/<set>", "The same by set; only with a `Mixture`.", "rising in each set."),
            ),
        ),
        Panel(
            "Verdicts",
            "share",
            XAxis.ROLLOUT,
            "RolloutMetrics",
            (
                Metric(
                    "rollout/verdict/<outcome>",
                    "Responses by what the verifier said: correct, wrong, unparseable (no answer can be read), timed_out "
                    "(killed at the deadline) or failed (the verifier itself). The five add up to 1.",
                    "timed_out and failed at 0: `Explain` speaks at 0.02 of both together. unparseable falling to near 0: "
                    "`Explain` speaks at 0.3; then ask for the form that the verifier reads, in `data.template`.",
                ),
            ),
        ),
        Panel(
            "Groups that teach nothing",
            "share",
            XAxis.ROLLOUT,
            "RolloutMetrics",
            (
                Metric(
                    "rollout/zero_spread_share",
                    "Groups whose rewards are all equal. They are skipped, so their sampling was for nothing.",
                    "low; `Explain` speaks at 0.8. Problems are then too hard or too easy, or answers cut off: change "
                    "`data.prompts`, or take more `data.plan.samples`.",
                ),
            ),
        ),
        Panel(
            "Response length",
            "tokens",
            XAxis.ROLLOUT,
            "RolloutMetrics",
            (
                Metric(
                    "rollout/response_length",
                    "Mean number of tokens in a response.",
                    "no level is known. Growing towards `data.sampling.max_tokens`, responses get cut off; collapsing "
                    "together with the accuracy, the policy has found a short cut.",
                ),
            ),
        ),
        Panel(
            "Responses cut off",
            "share",
            XAxis.ROLLOUT,
            "RolloutMetrics",
            (
                Metric(
                    "rollout/truncated_share",
                    "Responses that were cut off by `data.sampling.max_tokens`, mostly without an answer.",
                    "near 0; `Explain` speaks at 0.25. Raise `data.sampling.max_tokens`, or set `data.overlong`.",
                ),
            ),
        ),
        Panel(
            "Age of samples",
            "steps",
            XAxis.ROLLOUT_END,
            "RolloutMetrics",
            (
                Metric(
                    "rollout/staleness",
                    "Optimizer steps between the weights that sampled and those in training, mean over the rollout's steps.",
                    "half of `updates * passes - 1`; after the first rollout `updates * passes` more with `max_staleness: 1`.",
                ),
                Metric(
                    "rollout/staleness_max",
                    "The same of the oldest.",
                    "at most `updates * passes * (1 + max_staleness) - 1`; the run stops at a batch that is older.",
                ),
            ),
        ),
        Panel(
            "Sampling speed",
            "tokens/s",
            XAxis.ROLLOUT,
            "RolloutMetrics",
            (
                Metric(
                    "rollout/tokens_per_second",
                    "Response tokens sampled by all ranks together, over the mean rank's time.",
                    "steady. It falls when a few long responses are waited for.",
                ),
            ),
        ),
        Panel(
            "Time for a rollout",
            "s",
            XAxis.ROLLOUT,
            "RolloutMetrics",
            (
                Metric("rollout/seconds_sampling", "Sampling, until the last response had ended; mean over ranks."),
                Metric(
                    "rollout/seconds_verifying",
                    "Waiting for verdicts after the last response had ended, mean over ranks.",
                    "small beside `rollout/seconds_sampling`, as most responses are judged meanwhile. Else give the pool "
                    "more `workers`, or a shorter `deadline`.",
                ),
            ),
        ),
    ),
)

DATA = Section(
    "Data",
    (
        Panel(
            "What the data consists of",
            "text",
            XAxis.START,
            "DataReport",
            (
                Metric(
                    "data/report",
                    "Rows, what was left out of them and a fingerprint, by set; evaluation problems that are trained on.",
                    "the numbers that you expect of your files.",
                ),
            ),
            kind="text",
        ),
        Panel(
            "Training problems",
            "problems",
            XAxis.START,
            "DataReport",
            (Metric("data/problems", "Problems that are trained on.", "what you expect of your files."),),
        ),
        Panel(
            "Rows left out",
            "rows",
            XAxis.START,
            "DataReport",
            (
                Metric(
                    "data/repeated",
                    "Rows of the training set whose question came before.",
                    "what you expect: some sets repeat all.",
                ),
                Metric(
                    "data/conflicting",
                    "Questions left out because their rows disagree about the answer.",
                    "near 0; else find out which answers are wrong.",
                ),
                Metric(
                    "data/bad",
                    "Rows that cannot be used, such as a gold answer that does not verify itself.",
                    "0; `data/report` has the reasons.",
                ),
                Metric("data/too_long", "Prompts that leave no room for an answer.", "near 0; else take a longer context."),
            ),
        ),
        Panel(
            "Contamination",
            "problems",
            XAxis.START,
            "DataReport",
            (
                Metric(
                    "data/contaminated",
                    "Evaluation problems that match a training problem, exactly or nearly.",
                    "0. Else `eval/` measures memory; `contamination.json` has every pair.",
                ),
            ),
        ),
    ),
)
