"""The meaning of each stage's numbers, and rules that find a run that went wrong."""

from rlhf_jax.verdict import Condition, Rule

BEFORE = {"sft": "SFT", "start": "the model before"}
"""The policies that stages start from, as metrics and people call them."""
SFT_RULES = (
    Rule(
        "sft",
        (Condition("val_loss", "rises", 3.0),),
        "SFT: the validation loss rises, from {start:.3g} to {end:.3g}: fewer epochs or a smaller learning rate.",
    ),
    Rule(
        "sft",
        (Condition("loss", "does not fall", 3.0),),
        "SFT: nothing improves, the loss stays at {end:.3g}: the learning rate may be too small, or far too large.",
        "SFT: the loss falls, from {start:.3g} to {end:.3g}.",
    ),
)
SFT_ENDS = Rule(
    None,
    (Condition("sft_ended", "ends below", 0.5),),
    "SFT: few answers end by themselves, {end:.0%}: allow longer ones, or train until they end.",
    "SFT: {end:.0%} of the answers end by themselves.",
)
REWARD_RULES = (
    Rule(
        None,
        (Condition("reward_model_val_accuracy", "ends below", 0.55),),
        "The reward model predicts {end:.1%} of held-out comparisons: that is little more than chance.",
        "The reward model predicts {end:.1%} of held-out comparisons.",
    ),
)


def policy_rules(stage: str, who: str) -> tuple[Rule, ...]:
    """Rules about the answers that a policy samples."""
    return (
        Rule(
            stage,
            (Condition("ended", "ends below", 0.5),),
            f"{who}: few answers end by themselves, {{end:.0%}}: allow longer ones, or train SFT until it ends them.",
            f"{who}: {{end:.0%}} of the answers end by themselves.",
        ),
        Rule(
            stage,
            (Condition("kl_k1", "ends above", 50.0),),
            f"{who}: the KL from the reference reaches {{end:.3g}} nats a response: a larger β, fewer steps or a"
            " smaller learning rate.",
            f"{who}: the KL from the reference ends at {{end:.3g}} nats a response.",
        ),
    )


def preference_rules(stage: str, who: str) -> tuple[Rule, ...]:
    """Rules about preference optimisation."""
    return (
        *policy_rules(stage, who),
        Rule(
            None,
            (Condition(f"{stage}_val_accuracy", "ends below", 0.55),),
            "The implicit reward predicts {end:.1%} of held-out comparisons: that is little more than chance.",
            "The implicit reward predicts {end:.1%} of held-out comparisons.",
        ),
    )


PPO_RULES = (
    *policy_rules("ppo", "PPO"),
    Rule(
        "ppo",
        (Condition("no_end", "ends above", 0.5),),
        "PPO: the score's rule for answers without an end acts on {end:.0%} of them: the policy learns that rule, and"
        " little of the reward.",
    ),
    Rule(
        "ppo",
        (Condition("score", "does not rise", 2.0),),
        "PPO: nothing improves, the score goes from {start:.3g} to {end:.3g}: more steps, a larger learning rate or a"
        " smaller β.",
        "PPO: the score rises, from {start:.3g} to {end:.3g}.",
    ),
    Rule(
        "ppo",
        (Condition("entropy", "shrinks to", 0.1),),
        "PPO: the entropy collapses, from {start:.3g} to {end:.3g} nats a token.",
    ),
    Rule(
        "ppo",
        (Condition("score", "rises", 2.0), Condition("utility", "falls", 2.0)),
        "PPO: the reward climbs, from {start:.3g} to {end:.3g}, while the true utility falls, from {starts[1]:.3g} to"
        " {ends[1]:.3g}: the reward is hacked.",
    ),
    Rule(
        "ppo",
        (Condition("score", "rises", 2.0), Condition("watched", "falls", 2.0)),
        "PPO: the reward climbs, from {start:.3g} to {end:.3g}, while what is watched falls, from {starts[1]:.3g} to"
        " {ends[1]:.3g}: the reward may be hacked.",
    ),
    Rule(
        "ppo",
        (Condition("explained_variance", "ends below", 0.0),),
        "PPO: the critic explains nothing of the returns (explained variance {end:.2f}).",
    ),
    Rule(
        "ppo",
        (Condition("skipped", "ends above", 0.0),),
        "PPO: updates whose loss or gradient was not finite were skipped.",
    ),
)


def agreement_numbers(stage: str, who: str) -> dict[str, str]:
    """The meaning of a reward's numbers on held-out comparisons."""
    return {
        f"{stage}_val_accuracy": f"Held-out comparisons that the {who} predicts.",
        f"{stage}_val_accuracy_low": "Lower end of its 95% interval.",
        f"{stage}_val_accuracy_high": "Upper end of its 95% interval.",
        f"{stage}_length_baseline": "What picking the longer answer would predict.",
        f"{stage}_annotator_agreement": "How often two sampled annotators agree.",
        f"{stage}_ceiling": "What the best predictor of one annotator could reach: their noise sets it.",
        f"{stage}_share_of_ceiling": f"The {who}'s accuracy over that ceiling.",
        f"{stage}_share_above_chance": "The same above chance: (accuracy − ½) / (ceiling − ½).",
        f"{stage}_calibration_error": "Mean gap between predicted probability and observed share.",
        f"{stage}_calibration_floor": "That gap, if every prediction were right, at so many comparisons.",
    }


def policy_numbers(stage: str, who: str, before: str = "start") -> dict[str, str]:
    """The meaning of a policy's numbers, and of those of the policy it was trained from."""
    other = BEFORE[before]
    return {
        "demonstrators_utility": "Mean true utility of the demonstrations that SFT learned from.",
        f"{before}_utility": f"Mean true utility of {other}'s answers to held-out prompts, sampled at temperature 1.",
        f"{stage}_utility": f"The same for the policy after {who}.",
        "win_rate": f"Held-out prompts on which its answer has the higher true utility than {other}'s; a tie is half.",
        "win_rate_low": "Lower end of its 95% interval.",
        "win_rate_high": "Upper end of its 95% interval.",
        f"shifted_{before}_utility": f"True utility of {other} on prompts of another distribution.",
        f"shifted_{stage}_utility": f"That of the policy after {who}, on the same prompts.",
        "shifted_win_rate": f"Share of wins against {other} there.",
        f"{before}_score": f"The reward's score of {other}'s answers (DPO and its kin: the implicit one).",
        f"{stage}_score": f"Its score of the answers after {who}.",
        "score_win_rate": f"Held-out prompts on which the reward prefers its answer to {other}'s.",
        f"{stage}_kl_k1": "Nats a response between the policy and its reference, on samples.",
        f"{before}_length": f"Mean tokens of {other}'s answers.",
        f"{stage}_length": f"Mean tokens of answers after {who}.",
    }


SFT_NUMBERS = {name: policy_numbers("", "", "sft")[name] for name in ("demonstrators_utility", "sft_utility")}
REWARD_NUMBERS = agreement_numbers("reward_model", "reward model")
PPO_NUMBERS = {
    "ppo_seconds": "Seconds of the last PPO iteration.",
    "ppo_tokens_per_second": "Tokens sampled a second, the update included.",
    "ppo_compilations": "Programs compiled while PPO ran.",
}


def pass_numbers(stage: str, who: str) -> dict[str, str]:
    """The meaning of the numbers that only an algorithm without a critic has."""
    found = {f"{stage}_seconds": f"Seconds of the last {who} iteration."}
    for name, what in (("start", BEFORE["start"]), (stage, f"the policy after {who}")):
        found |= {
            f"{name}_pass@{k}": f"Held-out prompts that {what} solves in one of {k} answers." for k in (1, 2, 4, 8)
        }
    return found
