"""The report of each stage: its sections, what its numbers mean, and the rules that find a run that went wrong."""

from collections.abc import Sequence

from experiments.panels import (
    CHOICE,
    COSTS,
    ENDED,
    HEALTH,
    KL,
    LENGTH,
    PPO,
    REWARD_MODEL,
    SFT,
    UTILITY,
    against_kl,
    predicted,
    preference,
    side_by_side,
    truth,
)
from experiments.rules import (
    PPO_NUMBERS,
    PPO_RULES,
    REWARD_NUMBERS,
    REWARD_RULES,
    SFT_ENDS,
    SFT_NUMBERS,
    SFT_RULES,
    agreement_numbers,
    pass_numbers,
    policy_numbers,
    policy_rules,
    preference_rules,
)
from rlhf_jax.sections import (
    PROXY,
    QUIET,
    START,
    TRUTH,
    Examples,
    Line,
    Panel,
    Rates,
    Report,
    Section,
)
from rlhf_jax.verdict import Condition, Rule

SFT_ANSWERS = Examples(
    "Answers", "The first held-out prompts, one sample each.", (Line("sft", "SFT", START),),
    (Line("utility", "true utility"),),
)  # fmt: skip
PAIRS = Examples(
    "Comparisons", "The first held-out ones.",
    (Line("chosen", "preferred", TRUTH), Line("rejected", "the other", QUIET)), (Line("score", "score"),),
)  # fmt: skip
SFT_REPORT = Report((), (SFT,), SFT_ANSWERS, (*SFT_RULES, SFT_ENDS), SFT_NUMBERS)
REWARD_MODEL_REPORT = Report(
    (predicted("reward_model", "Reward model"),), (REWARD_MODEL,), PAIRS, REWARD_RULES, REWARD_NUMBERS,
)  # fmt: skip


def reward_model_report(stages: Sequence[str]) -> Report:
    """The report of a reward model, or of several that are an ensemble, a section each."""
    if len(stages) == 1:
        return REWARD_MODEL_REPORT
    sections = tuple(
        REWARD_MODEL._replace(title=f"Reward model {number} of {len(stages)}", stage=stage)
        for number, stage in enumerate(stages, 1)
    )
    numbers = REWARD_NUMBERS | {
        "reward_model_disagreement": "Held-out pairs on which two members prefer different answers.",
        "reward_model_spread": "Standard deviation over members of a held-out pair's difference of scores.",
    }
    headline = predicted("reward_model", "Mean of the reward models")
    return REWARD_MODEL_REPORT._replace(headlines=(headline,), sections=sections, explained=numbers)


PPO_REPORT = Report(
    (truth("ppo", "PPO"),),
    (PPO, against_kl("start"), HEALTH, COSTS),
    side_by_side("ppo", "PPO"),
    PPO_RULES,
    policy_numbers("ppo", "PPO") | PPO_NUMBERS,
)
PIPELINE_REPORT = Report(
    (truth("ppo", "PPO", "sft"), predicted("reward_model", "Reward model")),
    (SFT, CHOICE, REWARD_MODEL, PPO, against_kl("sft"), HEALTH, COSTS),
    side_by_side("ppo", "PPO", "sft"),
    SFT_RULES + REWARD_RULES + PPO_RULES,
    policy_numbers("ppo", "PPO", "sft") | PPO_NUMBERS | REWARD_NUMBERS,
)


def preference_report(stage: str, who: str) -> Report:
    """The report of DPO, IPO, SimPO, ORPO or KTO."""
    numbers = {
        **policy_numbers(stage, who),
        **agreement_numbers(stage, "implicit reward"),
        f"{stage}_val_chosen_change": "How log π of held-out chosen answers moved, in nats.",
        f"{stage}_val_rejected_change": "How log π of held-out rejected answers moved, in nats.",
    }
    headlines = (truth(stage, who), predicted(stage, "Implicit reward"))
    return Report(headlines, (preference(stage),), side_by_side(stage, who), preference_rules(stage, who), numbers)


def group_report(stage: str, who: str) -> Report:
    """The report of an algorithm without a critic."""
    rewarded = Section(
        who,
        "Answers to one prompt are each other's baseline. A group whose answers all score alike teaches nothing.",
        stage,
        "iteration",
        panels=(
            Panel("score", (Line("score", "score", PROXY),)),
            Panel("right answers", (Line("pass@1", "pass@1", TRUTH),)),
            UTILITY,
            KL,
            Panel("groups without a signal", (Line("silent", "share", QUIET),)),
            Panel("entropy, nats a token", (Line("entropy", "entropy"),)),
            Panel(
                "tokens a response",
                (Line("length", "all"), Line("length_right", "right", TRUTH), Line("length_wrong", "wrong", QUIET)),
            ),
            ENDED,
        ),
    )
    rules = (
        *policy_rules(stage, who),
        Rule(
            stage,
            (Condition("score", "does not rise", 2.0),),
            f"{who}: nothing improves, the score goes from {{start:.3g}} to {{end:.3g}}: more steps, a larger learning"
            " rate, easier prompts or larger groups.",
            f"{who}: the score rises, from {{start:.3g}} to {{end:.3g}}.",
        ),
        Rule(
            stage,
            (Condition("silent", "ends above", 0.9),),
            f"{who}: in {{end:.0%}} of the groups all answers score alike: the prompts are too hard or too easy.",
        ),
        Rule(
            stage,
            (Condition("entropy", "shrinks to", 0.1),),
            f"{who}: the entropy collapses, from {{start:.3g}} to {{end:.3g}} nats a token.",
        ),
        Rule(
            stage,
            (Condition("score", "rises", 2.0), Condition("utility", "falls", 2.0)),
            f"{who}: the reward climbs, from {{start:.3g}} to {{end:.3g}}, while the true utility falls, from"
            " {starts[1]:.3g} to {ends[1]:.3g}: the reward is hacked.",
        ),
        Rule(
            stage,
            (Condition("score", "rises", 2.0), Condition("watched", "falls", 2.0)),
            f"{who}: the reward climbs, from {{start:.3g}} to {{end:.3g}}, while what is watched falls, from"
            " {starts[1]:.3g} to {ends[1]:.3g}: the reward may be hacked.",
        ),
    )
    return Report(
        (truth(stage, who),), (rewarded,), side_by_side(stage, who), rules,
        policy_numbers(stage, who) | pass_numbers(stage, who),
    )  # fmt: skip


BEST_OF_N_REPORT = Report(
    (),
    (
        Section(
            "Best of n",
            "Means over held-out prompts, without bias, from one pool of answers to each.",
            "best_of_n",
            "answers to choose from",
            panels=(
                Panel("score of the best of n", (Line("score", "score", PROXY),)),
                UTILITY,
                Panel("watched scorers", (Line("watched", "their mean", TRUTH),)),
                Panel("KL from the model, nats a response, at most", (Line("kl_bound", "log n − (n − 1)/n"),)),
            ),
        ),
    ),
    side_by_side("best_of_n", "the best of n"),
    (),
    {},
)
"""The report of best of n."""
REJECTION_REPORT = Report(
    (truth("rejection_sampling", "Rejection sampling"),),
    (
        Section(
            "Rejection sampling",
            "Each round learns from the best of the last policy's own answers.",
            "rejection_sampling",
            "round",
            panels=(
                Panel("score", (Line("score", "score", PROXY),)),
                UTILITY,
                Panel("KL from the model before, nats a response", (Line("kl", "k1", START),)),
                LENGTH,
            ),
        ),
    ),
    side_by_side("rejection_sampling", "rejection sampling"),
    (),
    policy_numbers("rejection_sampling", "rejection sampling"),
)
JUDGE_REPORT = Report(
    (
        Section(
            "The judge and people",
            "Share of comparisons on which it prefers what people prefer, with 95% intervals; chance is dashed.",
            rates=Rates(
                (
                    Line("judge_agreement", "mean of both orders"),
                    Line("judge_agreement_first", "people's choice shown first"),
                    Line("judge_agreement_second", "people's choice shown second"),
                    Line("judge_length_baseline", "pick the longer"),
                ),
                0.5,
                "agreement with people",
            ),
        ),
    ),
    (
        Section(
            "Judge",
            "Over the pairs so far. A judge who takes the first in most pairs goes by place.",
            "judge",
            "pairs",
            panels=(
                Panel("agreement with people", (Line("agreement", "both orders", TRUTH),)),
                Panel("both orders say the same", (Line("orders_agree", "share"),)),
                Panel("takes the response shown first", (Line("takes_first", "share", PROXY),)),
                Panel("no verdict", (Line("failed", "failed", QUIET),)),
            ),
        ),
    ),
    Examples(
        "Pairs", "The first ones, with the judge's probability of each, by the mean of both orders.",
        (Line("people", "preferred by people", TRUTH), Line("other", "the other", QUIET)),
        (Line("probability", "probability"),),
    ),
    (
        Rule(
            None,
            (Condition("judge_orders_agree", "ends below", 0.5),),
            "The judge goes by place: in {end:.0%} of the pairs both orders say the same.",
        ),
    ),
    {
        "judge_agreement": "Pairs on which the mean of both orders prefers what people prefer; a tie is half.",
        "judge_orders_agree": "Pairs on which both orders prefer the same response.",
        "judge_takes_first": "Verdicts for the response shown first.",
        "judge_mean_first": "Mean probability of the response shown first.",
        "judge_ties": "Pairs on which the mean of both orders is exactly a half.",
        "judge_failed": "Pairs without a verdict in one order or both.",
    },
)  # fmt: skip
"""The report of a judge on comparisons."""
CONSTITUTIONAL_REPORT = Report(
    (truth("constitutional", "Constitutional AI"),),
    (
        Section(
            "Critique and revision",
            "An answer, and then its revisions; the last ones are learned.",
            "chains",
            "revision",
            panels=(UTILITY, Panel("words an answer", (Line("words", "words"),))),
        ),
        SFT._replace(title="Learning the revisions", note="", stage="revised"),
        preference("dpo"),
    ),
    Examples(
        "Chains and answers",
        "First the chains: an answer, what the model finds wrong with it by a principle, and how it revises it. Then"
        " answers to held-out prompts before and after.",
        (
            Line("answer", "answer"),
            *(Line(f"{what} {n}", f"{what} {n}") for n in range(1, 9) for what in ("critique", "revision")),
            Line("start", "before"),
            Line("constitutional", "Constitutional AI", TRUTH),
        ),
    ),
    (),
    policy_numbers("constitutional", "Constitutional AI"),
)
"""The report of Constitutional AI."""
ITERATE_REPORT = Report(
    (truth("policy", "The last round"),),
    (
        Section(
            "Rounds",
            "In each round the last policy's answers are labelled, and the reward model learns on.",
            "rounds",
            "round",
            panels=(
                Panel("reward model's score: the proxy", (Line("score", "score", PROXY),)),
                UTILITY,
                Panel("KL from the model before, nats a response", (Line("kl", "k1", START),)),
                Panel("agreement with held-out labels", (Line("val_accuracy", "held out", PROXY),)),
                Panel("labels so far", (Line("labels", "labels"),)),
            ),
        ),
    ),
    side_by_side("policy", "the last round"),
    (),
    policy_numbers("policy", "the last round"),
)
"""The report of the loop."""
