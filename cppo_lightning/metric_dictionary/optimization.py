"""Loss, gradient and speed of the optimizer's steps."""

from cppo_lightning.metric_dictionary.entries import Metric, Panel, Section, XAxis

TRAINING = Section(
    "Optimizer steps",
    (
        Panel(
            "Loss",
            "advantage",
            XAxis.STEP,
            "RLVRModule",
            (
                Metric(
                    "train/loss",
                    "What is minimised: minus the surrogate, plus the weighted KL to the reference if there is one.",
                    "around 0, without a trend. At a rollout's first update ratios are 1, and the advantages of a group add up "
                    "to 0: so does the loss where all responses weigh the same (`seq-mean-token-mean`, or equal lengths), but "
                    "with `token-mean` the longer ones weigh more. It does not measure progress; `rollout/reward` does.",
                ),
                Metric(
                    "train/surrogate",
                    "The policy objective, aggregated as `model.aggregation` says: each token's weight times its advantage; "
                    "with CISPO and MinPRO also times log pi; with PPOClip, GSPO and SAPO the objective that they define.",
                    "around 0, like `train/loss`; with CISPO and MinPRO not 0 at a rollout's first update, since "
                    "log pi differs from response to response.",
                ),
            ),
        ),
        Panel(
            "Entropy of the policy",
            "nats",
            XAxis.STEP,
            "RLVRModule",
            (
                Metric(
                    "train/entropy",
                    "Entropy of the policy's next-token distribution, mean over response tokens.",
                    "no level is known; it depends on model and task. Towards 0 the samples of a group become equal and "
                    "teach nothing (`Explain` speaks at 0.15 of the first step's); a steep rise comes before gibberish. In "
                    "both cases lower the learning rate or tighten the trust region.",
                ),
            ),
        ),
        Panel(
            "KL to the reference",
            "nats",
            XAxis.STEP,
            "RLVRModule",
            (
                Metric(
                    "train/reference_kl",
                    "Estimated KL per token to the initial policy, by `model.reference_kl.estimator`; only with "
                    "`model.reference_kl`.",
                    "0 at the first step, then a slow rise. No limit is known; if it jumps, lower the learning rate.",
                ),
            ),
        ),
        Panel(
            "Gradient norm",
            "norm",
            XAxis.STEP,
            "RLVRModule",
            (
                Metric(
                    "train/grad_norm",
                    "L2 norm of the gradient before clipping.",
                    "no level is known. Above `model.max_grad_norm` at nearly every step, clipping sets the step size: lower "
                    "the learning rate. At 0 every token was dropped.",
                ),
            ),
        ),
        Panel(
            "Learning rate",
            "per step",
            XAxis.STEP,
            "RLVRModule",
            (
                Metric(
                    "train/learning_rate",
                    "Learning rate of the optimizer's first parameter group at this step.",
                    "as `model.lr_scheduler` says; the paper trains at a constant 1e-6.",
                ),
            ),
        ),
        Panel(
            "Training speed",
            "tokens/s",
            XAxis.STEP,
            "RLVRModule",
            (
                Metric(
                    "train/tokens_per_second",
                    "Response tokens trained on by all ranks together, over the time of the step on rank 0.",
                    "steady. If it falls while responses keep their length, something else uses the device.",
                ),
            ),
        ),
        Panel(
            "Steps not taken",
            "steps",
            XAxis.STEP,
            "NonFiniteGuard",
            (
                Metric(
                    "train/nonfinite_steps",
                    "Steps not taken so far, because the loss or a gradient was not finite.",
                    "0. Else read the minibatch that the callback kept, lower the learning rate, or take a wider dtype.",
                ),
            ),
        ),
    ),
)
