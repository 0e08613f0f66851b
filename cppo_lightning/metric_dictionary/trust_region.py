"""What the trust region drops, what its prefix budget does, and how far the policy has moved."""

from cppo_lightning.metric_dictionary.entries import Metric, Panel, Section, XAxis

MASK = Section(
    "Mask",
    (
        Panel(
            "Dropped tokens",
            "share",
            XAxis.STEP,
            "MaskRate",
            (
                Metric(
                    "mask/rate",
                    "Response tokens whose gradient the trust region dropped.",
                    "0 at the first update of an on-policy rollout by design: the policy has not moved yet. For later "
                    "updates no range is known. Always 0, the trust region does nothing; `Explain` speaks at 0.8 of the "
                    "tokens that do not move back.",
                ),
                Metric(
                    "mask/by_position",
                    "Dropped because the weighted divergence of the token itself is above delta. CPPO only.",
                ),
                Metric(
                    "mask/by_budget",
                    "Dropped because the tokens before it had spent the prefix budget. CPPO only; over `mask/rate` it is the "
                    "share of the paper's Figure 7.",
                    "no range is known. If nearly all that is dropped is dropped by the budget, raise `delta_b`, or look at "
                    "`mismatch/budget_rate`: numerics may spend it.",
                ),
            ),
        ),
        Panel(
            "Tokens that move back",
            "share",
            XAxis.STEP,
            "MaskRate",
            (
                Metric(
                    "mask/toward",
                    "Response tokens whose update pulls the policy back to the one that sampled. CPPO never drops these.",
                    "none known. At the first update of an on-policy rollout the policy has moved nowhere, and it only shows "
                    "the signs of rounding errors.",
                ),
            ),
        ),
        Panel(
            "Dropped tokens by position",
            "share",
            XAxis.STEP,
            "MaskRate",
            (
                Metric(
                    "mask/rate_at/<from>-<to>",
                    "Dropped tokens among those in this slice of their response, in per cent of its own length.",
                    "none known. CPPO is strict early in a response and lenient late in it, unless the budget runs out.",
                ),
            ),
        ),
    ),
)

BUDGET = Section(
    "Prefix budget",
    (
        Panel(
            "Responses out of budget",
            "share",
            XAxis.STEP,
            "BudgetExhaustion",
            (
                Metric(
                    "budget/exhausted_share",
                    "Responses in which the threshold c_t of some token fell to 0 or below, so that only updates back to the "
                    "sampling policy were kept there.",
                    "near 0 at the first update of an on-policy rollout, else numerics spend the budget "
                    "(`mismatch/budget_rate`). Later no range is known; `Explain` speaks at 0.5, if it happens in the first "
                    "0.25 of the response.",
                ),
            ),
        ),
        Panel(
            "Where the budget ran out",
            "share of the length",
            XAxis.STEP,
            "BudgetExhaustion",
            (
                Metric(
                    "budget/first_exhausted",
                    "Where the budget first ran out, over the responses where it did, as a share of their own length; "
                    "nothing is logged if it did in none.",
                    "none known. Near 0, most of such a response teaches nothing: raise `delta_b`, or lower the learning rate.",
                ),
            ),
        ),
        Panel(
            "Budget spent",
            "ratio",
            XAxis.STEP,
            "BudgetExhaustion",
            (
                Metric(
                    "budget/spent_mean",
                    "Weighted divergence of a whole response over what it was allowed before its last token, mean over "
                    "responses.",
                    "below 1, where the budget lasts. Above 1 in most responses, the budget decides more than delta.",
                ),
                Metric("budget/spent_max", "The same of the response that spent most."),
            ),
        ),
        Panel(
            "Effective delta_b",
            "divergence",
            XAxis.STEP,
            "BudgetExhaustion",
            (
                Metric(
                    "budget/delta_b",
                    "Budget that each unit of position weight adds, mean over responses (paper, Figure 7).",
                    "`delta_b` with `adaptive: false`, and from `delta_b` to `ceiling` times it with `adaptive: true` "
                    "(paper, Eq. 22), plus `noise`. At the ceiling all the time, the budget does not adapt.",
                ),
            ),
        ),
        Panel(
            "Threshold",
            "divergence",
            XAxis.STEP,
            "BudgetExhaustion",
            (
                Metric(
                    "budget/threshold",
                    "Threshold c_t that a token's weighted divergence is held to, mean over tokens; negative where more was "
                    "spent than allowed.",
                    "at most delta, which it equals where the budget does not bind. Below 0 the usual token is out of budget.",
                ),
            ),
        ),
    ),
)

MOVEMENT = Section(
    "Divergence",
    (
        Panel(
            "Divergence from the sampling policy, mean",
            "divergence",
            XAxis.STEP,
            "Divergence",
            (
                Metric(
                    "trust_region/divergence_mean",
                    "Divergence D_t of the policy from the one that sampled, by the trust region's own measure, mean over "
                    "tokens.",
                    "at the first update of an on-policy rollout what numerics make of it (`mismatch/divergence_mean`), more "
                    "at each later update. No limit is known; `Explain` speaks at 0.3 of delta: then lower the learning "
                    "rate, or take fewer `data.plan.updates`.",
                ),
                Metric(
                    "trust_region/weighted_divergence_mean",
                    "The same times the position weight w_t. CPPO only.",
                    "between w_min times `trust_region/divergence_mean` and all of it, as w_t is from w_min to 1.",
                ),
            ),
        ),
        Panel(
            "Divergence from the sampling policy, largest",
            "divergence",
            XAxis.STEP,
            "Divergence",
            (
                Metric(
                    "trust_region/divergence_max",
                    "Largest D_t of any token.",
                    "single tokens may be far above delta, and are then dropped. Total variation is at most 1.",
                ),
                Metric("trust_region/weighted_divergence_max", "Largest w_t D_t of any token. CPPO only."),
            ),
        ),
    ),
)
