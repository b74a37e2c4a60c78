"""A liking for length reaches the policy dose by dose; how much of the reward's gain it is, and what corrects it.

Singhal et al. 2023 (https://arxiv.org/abs/2310.03716) find that 47 to 98% of what PPO gains in reward is length, on
three sets: among answers of equal length less is gained; and that length alone as a reward does most of what a reward
model does. Park et al. 2024 (https://arxiv.org/abs/2403.19159) let DPO maximise a reward minus α for each token. Here
annotators like each word by a dose, where the true worth of an empty word is −0.16 and less; whatever the dose, two of
them agree as often, so their noise grows with it. Each seed has a world and an SFT policy of its own; reward models
and DPO learn the annotators' rankings of its answers.
    python experiments/ablations/length.py
PPO and DPO against the largest dose are also run with their corrections: the reward model's slope by length, within
prompts, is taken off its scores; α is what its pairs say that a token is worth to the annotators. Expect about 25
minutes on 2 CPU cores for 5 seeds.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from experiments import dpo, ppo, reward_model
from experiments.ablations.claims import Claim, minus, of, times
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, points_line, variants_table
from experiments.ablations.worlds import AfterSFT, after_sft
from experiments.dpo import DPO
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.sft import SFT
from experiments.stages import train_preference
from rlhf_jax.cli import run_main
from rlhf_jax.data.pairs import AnswerBatch, paired
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.rewards.reward import Reward
from rlhf_jax.simulation import Annotators
from rlhf_jax.tasks.measure import compare_policies, make_reward_scorer
from rlhf_jax.types import Params

Learner = Literal["ppo", "ppo_length_alone", "ppo_corrected", "dpo", "dpo_corrected"]
COLUMNS = (
    Column("words an answer", "length", 1), Column("SFT's", "sft_length", 1), Column("true utility", "utility"),
    Column("SFT's", "sft_utility"), Column("annotators' gain", "perceived_gain"),
    Column("reward gained", "score_gain"), Column("at equal length, share", "same_length_share"),
    Column("answers whose length both have", "same_length_answers", 3),
    Column("KL, nats", "kl", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """Annotators who like length more and less, several seeds."""

    doses: tuple[float, ...] = (0.0, 0.08, 0.2, 0.4)
    """The worth of a word to the annotators. PPO follows each; the other learners the last one."""
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=PPO)
    preference: DPO = field(default_factory=DPO)

    def __post_init__(self) -> None:
        """Raises UserError without doses."""
        super().__post_init__()
        if not self.doses:
            raise UserError("--doses needs numbers, as in 0 0.4")


class Variant(NamedTuple):
    """A way to learn, and the dose."""

    learner: Learner
    dose: float


def variants(cfg: Config) -> list[Variant]:
    """PPO at all doses, and each other learner at the largest."""
    others: tuple[Learner, ...] = ("ppo_length_alone", "ppo_corrected", "dpo", "dpo_corrected")
    return [Variant("ppo", dose) for dose in cfg.doses] + [Variant(one, max(cfg.doses)) for one in others]


def one(cfg: Config, prepared: None, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """One learner on one dose: where it ends beside SFT, and how much of its reward's gain is length."""
    people = Annotators(noise=0.0, length_bias=variant.dose)
    begun = after_sft(cfg, seed, run, annotators=people)
    if variant.learner.startswith("dpo"):
        policy, reward = by_dpo(cfg, begun, seed, variant, run), None
    else:
        policy, reward = by_ppo(cfg, begun, seed, variant, run)
    task, base = begun.task, begun.base
    heldout, policies = task.prompts().heldout, (base.params, policy)
    answers = [begun.sampler(params, heldout, 500 + side) for side, params in enumerate(policies)]
    truths = [task.judge(heldout, some) for some in answers]
    perceived = [
        people.perceive(truth, task.base.read_answers(some), task.setting.flattery).mean()
        for truth, some in zip(truths, answers, strict=True)
    ]
    lengths = [np.asarray(some.mask.sum(axis=1)) - task.base.ended(some) for some in answers]
    found: dict[str, Any] = {
        "dose": variant.dose, "length": lengths[1].mean(), "sft_length": lengths[0].mean(),
        "utility": truths[1].mean(), "sft_utility": truths[0].mean(), "perceived_gain": perceived[1] - perceived[0],
    }  # fmt: skip
    if reward is None:
        return found
    score = make_reward_scorer(task, [reward], None)
    scores = [score(heldout, some) for some in answers]
    found["score_gain"] = scores[1].mean() - scores[0].mean()
    gain, found["same_length_answers"] = gain_at_equal_length(*lengths, *scores)
    found["same_length_share"] = gain / found["score_gain"]
    compare_policies(run, task, ("sft", base.params), ("policy", policy), begun.sampler, score)  # writes examples
    return found | {"kl": np.mean([row["kl_k1"] for row in read_metrics(run.dir)["ppo"][-5:]])}


def by_ppo(cfg: Config, begun: AfterSFT, seed: int, variant: Variant, run: Run) -> tuple[Params, Reward]:
    """PPO against the reward model of the annotators' rankings, or what is made of it; also the reward model."""
    task, base = begun.task, begun.base
    rewards, _ = reward_model.train(
        cfg.reward_model, base, begun.comparisons, run, seed, eval_batch_size=task.eval_batch_size,
        zero=task.demonstrations().validation,
    )  # fmt: skip
    model = model_reward(base.config, rewards, name="reward_model", weight=1.0)
    followed = model
    if variant.learner != "ppo":
        fresh = task.prompts().choice
        assert fresh is not None
        asked = take(fresh, np.arange(len(fresh.row)).repeat(8))
        answers = begun.sampler(base.params, asked, 600)
        scores, lengths = make_reward_scorer(task, [model], None)(asked, answers), np.asarray(answers.mask.sum(axis=1))
        if variant.learner == "ppo_corrected":
            followed = with_length(model, -slope_within(scores, lengths, 8), 1.0)
        else:  # in the reward model's spread, so that β weighs as much
            followed = with_length(model, float(scores.std() / lengths.std()), 0.0)
    policy, _ = ppo.train(
        cfg.ppo, base, task.prompts(), [followed], run, seed, max_new_tokens=task.max_new_tokens,
        critic=(base.config, rewards), judge=task.judge,
    )  # fmt: skip
    return policy, model


def with_length(model: Reward, a_token: float, factor: float) -> Reward:
    """So many times a reward, plus so much for each token of an answer."""
    score = model.on_tokens
    assert score is not None

    def scores(params: Params, tokens: Any) -> Any:
        return factor * score(params, tokens) + a_token * tokens.mask.sum(axis=1)

    return model._replace(name="with_length", on_tokens=scores)


def by_dpo(cfg: Config, begun: AfterSFT, seed: int, variant: Variant, run: Run) -> Params:
    """DPO, or Park et al.'s loss, where it is corrected: −log σ(β Δ log π/π_ref + α Δ|y|), chosen minus rejected."""
    flags = cfg.preference
    examples, alpha = paired(begun.comparisons.train, flags.pairs), 0.0
    if variant.learner == "dpo_corrected":
        lengths = np.array([len(response) for _, response in examples.answers], float)
        alpha = worth_of_a_token(lengths[examples.groups[:, 0]] - lengths[examples.groups[:, 1]])

    def loss(logprobs: Any, batch: AnswerBatch, nothing: Any) -> Any:
        return dpo.loss(flags, logprobs + alpha / flags.beta * batch.lengths, batch, nothing)

    return train_preference(
        flags, loss, partial(dpo.reward, flags), begun.base, examples, begun.comparisons, run, seed, stage="dpo",
        eval_batch_size=begun.task.eval_batch_size,
    ).params  # fmt: skip


def worth_of_a_token(differences: np.ndarray) -> float:
    """The α under which pairs are likeliest by length alone, Π σ(α (|chosen| − |rejected|)): by Newton's method."""
    alpha = 0.0
    for _ in range(30):
        wrong = 1 / (1 + np.exp(alpha * differences))
        alpha += float((differences * wrong).sum() / (differences**2 * wrong * (1 - wrong)).sum())
    return alpha


def slope_within(scores: np.ndarray, lengths: np.ndarray, group: int) -> float:
    """The least-squares slope of scores by length among a prompt's own answers, `group` in a row of each prompt."""
    x, y = (values.reshape(-1, group) - values.reshape(-1, group).mean(axis=1, keepdims=True)
            for values in (lengths.astype(float), scores))  # fmt: skip
    return float((x * y).sum() / (x * x).sum())


def gain_at_equal_length(
    before_lengths: np.ndarray, lengths: np.ndarray, before_scores: np.ndarray, scores: np.ndarray
) -> tuple[float, float]:
    """The mean gain among answers of equal length, weighted by how many of the policy's have it [Singhal et al., §3].

    Lengths that either policy has fewer than three times are left out: the second number is the share of the policy's
    answers that are not.
    """
    gains, weights = [], []
    for length in np.unique(lengths):
        old, new = before_scores[before_lengths == length], scores[lengths == length]
        if min(len(old), len(new)) >= 3:
            gains.append(new.mean() - old.mean())
            weights.append(len(new))
    return (float(np.average(gains, weights=weights)) if gains else float("nan")), sum(weights) / len(lengths)


def differ(name: str, first: Learner, second: Learner) -> Any:
    """A number of one learner above another's, at the largest dose."""
    return minus(of(name, learner=first, dose=0.4), of(name, learner=second, dose=0.4))


CLAIMS = (
    Claim("a liking for length reaches the policy", "Singhal et al. 2023, table 2", "answers grow 1.3 to 2.3 times",
          minus(of("length", learner="ppo", dose=0.4), of("length", learner="ppo", dose=0.0)), "words, dose 0.4"
          " above 0", above=1.0, digits=1),
    Claim("and at half of that dose, too", "Singhal et al. 2023", "with the bias of the data",
          minus(of("length", learner="ppo", dose=0.2), of("length", learner="ppo", dose=0.0)), "words, dose 0.2"
          " above 0", above=0.5, digits=1),
    Claim("most of the reward's gain is length", "Singhal et al. 2023, table 1", "98, 73 and 47% on three sets",
          of("same_length_share", learner="ppo", dose=0.4), "of the gain at equal length, dose 0.4", below=0.3),
    Claim("length alone as a reward does most of it", "Singhal et al. 2023, table 2", "about as many wins",
          minus(of("perceived_gain", learner="ppo_length_alone", dose=0.4),
                times(0.5, of("perceived_gain", learner="ppo", dose=0.4))),
          "of what annotators perceive above a half of the reward model's", above=0.0),
    Claim("the corrected reward model is truly better", "Singhal et al. 2023, §4; Shen et al. 2023", "length falls,"
          " quality stays on some sets", differ("utility", "ppo_corrected", "ppo"), "of true utility, dose 0.4",
          above=0.0),
    Claim("DPO with α a token writes less", "Park et al. 2024", "it prevents length exploitation",
          differ("length", "dpo_corrected", "dpo"), "words, dose 0.4", below=0.0, digits=1),
    Claim("and is truly better", "Park et al. 2024", "more wins by a length-controlled judge",
          differ("utility", "dpo_corrected", "dpo"), "of true utility, dose 0.4", above=0.0),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a learner and dose; length and true utility of PPO by dose."""
    found = [variant for variant in cells.finished() if variant.learner == "ppo"]
    panels = [
        Panel(title, "worth of a word to annotators", ylabel, [points_line(cells, found, "dose", name, "PPO")])
        for title, ylabel, name in (("Length", "words", "length"), ("Truth", "true utility", "utility"))
    ]
    return Page([variants_table(cells, ["learner", "dose"], COLUMNS)], panels if found else [])


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each variant's means over seeds."""
    return run_grid(cfg, "length", variants(cfg), one, present, axes=("doses",))


if __name__ == "__main__":
    run_main(main, Config)
