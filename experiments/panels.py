"""The sections of reports: pictures and tables of each kind of stage, named by the metrics that they show."""

from experiments.rules import (
    BEFORE,
)
from rlhf_jax.sections import (
    PROXY,
    QUIET,
    START,
    TRUTH,
    Arrow,
    Column,
    Costs,
    Examples,
    Frontier,
    Line,
    Panel,
    Point,
    Rates,
    Section,
    Table,
)

AGREEMENT = Panel(
    "agreement with annotators", (Line("accuracy", "training", QUIET), Line("val_accuracy", "held out", PROXY))
)
UTILITY = Panel("true utility: only measured", (Line("utility", "true utility", TRUTH),))
KL = Panel(
    "KL from the reference, nats a response",
    (Line("kl_k1", "k1", START), Line("kl_k2", "k2", QUIET), Line("kl_k3", "k3", PROXY)),
)
LENGTH = Panel("tokens a response", (Line("length", "length"),))
ENDED = Panel("answers that end by themselves", (Line("ended", "share"),))
SFT = Section(
    "Supervised fine-tuning",
    "Imitation of the demonstrations; it can get as good as they are, not better.",
    "sft",
    panels=(
        Panel("loss, nats a token", (Line("loss", "training", QUIET), Line("val_loss", "validation"))),
        Panel("true utility of samples", (Line("utility", "true utility", TRUTH),)),
    ),
)
CHOICE = Section(
    "Which SFT epoch",
    "PPO starts from the epoch whose samples the reward model likes best (Ouyang et al. 2022, §3.5).",
    "choice",
    table=Table(
        "epoch",
        (
            Column("score", "reward model's score of its samples", "highest", "PPO starts here"),
            Column("val_loss", "validation loss", "lowest", "lowest", digits=4),
        ),
    ),
)
REWARD_MODEL = Section(
    "Reward model",
    "Learns from comparisons which of two answers people prefer (Bradley-Terry).",
    "reward_model",
    panels=(Panel("loss, nats a pair", (Line("loss", "training", QUIET),)), AGREEMENT),
)


def preference(stage: str) -> Section:
    """The panels of preference optimisation."""
    return Section(
        "Preference optimisation",
        "A policy from comparisons, without a reward model. That log π of chosen answers falls, too, is usual.",
        stage,
        panels=(
            Panel("loss", (Line("loss", "training", QUIET),)),
            AGREEMENT,
            UTILITY,
            KL,
            Panel(
                "log π moved by, nats",
                (Line("val_chosen_change", "chosen", TRUTH), Line("val_rejected_change", "rejected", QUIET)),
            ),
            LENGTH,
            ENDED,
        ),
    )


PPO = Section(
    "PPO",
    "The policy maximises the score minus β·KL. Where the proxy climbs and the truth falls, it is hacked.",
    "ppo",
    "iteration",
    panels=(Panel("reward model's score: the proxy", (Line("score", "score", PROXY),)), UTILITY, KL),
)


def against_kl(before: str) -> Section:
    """Reward against the distance from the policy of that name."""
    return Section(
        "Reward against distance",
        "How much reward a given distance from the reference buys.",
        "ppo",
        frontier=Frontier(
            "kl_k1",
            (Line("score", "reward model's score (proxy)", PROXY), Line("utility", "true utility", TRUTH)),
            fit="utility",
            start=f"{before}_utility",
            xlabel="d = √KL from the reference, √nats a response",
        ),
    )


HEALTH = Section(
    "Is PPO healthy?",
    "Entropy near 0 is a collapse; a clip fraction above a third means steps too large; an explained variance at or"
    " below 0 means that the critic says nothing; the gap is sampling and training disagreeing about one token.",
    "ppo",
    "iteration",
    panels=(
        Panel("entropy, nats a token", (Line("entropy", "entropy"),)),
        Panel("clip fraction", (Line("clip_fraction", "clip fraction"),)),
        Panel("explained variance of the critic", (Line("explained_variance", "explained variance"),)),
        Panel("value loss", (Line("value_loss", "value loss"),)),
        LENGTH,
        ENDED,
        Panel("sampler–trainer gap, nats", (Line("sampler_gap", "mean"), Line("sampler_gap_max", "largest", QUIET))),
        Panel("β", (Line("beta", "β"),)),
    ),
)
COSTS = Section(
    "A PPO iteration",
    "Mean over the iterations after the first, which compiles.",
    "ppo",
    costs=Costs(
        (Line("seconds", "seconds"), Line("tokens_per_second", "tokens sampled a second")),
        (Line("compilations", "programs compiled"),),
    ),
)


def truth(stage: str, who: str, before: str = "start") -> Section:
    """The headline where true utility is known: that of the policy before the stage, and after it."""
    return Section(
        "How good the answers truly are",
        f"{who}, trained on people's comparisons, against {BEFORE[before]}.",
        sentences=(f"{who}'s answer is the better one on {{win_rate:.1%}} of held-out prompts.",),
        arrow=Arrow(
            Point(f"{before}_utility", f"{before}_utility_se", BEFORE[before], START),
            Point(f"{stage}_utility", f"{stage}_utility_se", who, TRUTH),
            "mean true utility on held-out prompts (bars: 95% interval)",
            Line("demonstrators_utility", "demonstrators"),
        ),
    )


def predicted(stage: str, what: str) -> Section:
    """The headline where no true utility is known: how often a stage's reward predicts what people chose."""
    return Section(
        what,
        "Share of held-out comparisons predicted, with 95% intervals; chance is dashed.",
        rates=Rates(
            (
                Line(f"{stage}_val_accuracy", what.lower()),
                Line(f"{stage}_length_baseline", "pick the longer"),
            ),
            0.5,
            "agreement with held-out people",
        ),
    )


def side_by_side(stage: str, who: str, before: str = "start") -> Examples:
    """Answers before the stage beside those of its policy."""
    return Examples(
        "Answers side by side",
        "The first held-out prompts, one sample each.",
        (Line(before, BEFORE[before], START), Line(stage, who, TRUTH)),
        (Line("utility", "true utility"), Line("score", "score")),
    )
