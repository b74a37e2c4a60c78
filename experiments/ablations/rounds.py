"""The same number of labels in one round, in three at random, and in three where the reward model is least certain.

Bai et al. 2022, §4.5 (https://arxiv.org/abs/2204.05862) train on labels of their latest policies' answers, and find
the policies of as many labels better. Each seed has a world and an SFT policy of its own. In one round all labels are
of SFT's answers; in three each third is of the last policy's answers to fresh prompts, and the reward model learns on
(`experiments/iterate.py`). PPO starts from SFT in each round, at a β at which the reward model is over-optimised.
    python experiments/ablations/rounds.py
It takes about half an hour on 2 CPU cores for 5 seeds. In three rounds the first labels are learned three times. A
mean at 3 or 6 nats is over the seeds whose policy gets there.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from experiments import iterate
from experiments.ablations.claims import Claim, minus, of
from experiments.ablations.grid import GridFlags, only_words, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, curve_line, smooth, variants_table
from experiments.ablations.worlds import world_with_sft
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.sft import SFT
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.tasks.measure import compare_policies, make_policy_measure, make_reward_scorer

Name = Literal["once", "random", "uncertain", "disagreement"]
COLUMNS = (
    Column("true utility", "policy_utility"), Column("beats SFT", "win_rate", 3), Column("proxy", "policy_score"),
    Column("KL to SFT, nats", "kl", 1), Column("true utility at 3 nats", "utility_at_3"),
    Column("at 6 nats", "utility_at_6"), Column("agreement with held-out labels", "val_accuracy", 3),
    Column("labelled prompts", "labels", 0),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """One round and three, with as many labels, several seeds."""

    plans: tuple[Name, ...] = ("once", "random", "uncertain")
    """uncertain asks about answers that one reward model finds alike, disagreement about those on which 3 differ."""
    rounds: int = 3
    labels: int = 1536
    """Prompts whose 8 answers are ranked, in all rounds together."""
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=lambda: PPO(beta=0.02))

    def __post_init__(self) -> None:
        """Raises UserError for labels that do not divide into rounds."""
        at_least(self, rounds=2, labels=2)
        if self.labels % self.rounds:
            raise UserError(f"{self.labels} labels do not divide into {self.rounds} rounds")
        super().__post_init__()

    def hurried(self) -> Any:
        """The flags of a quick run."""
        return replace(super().hurried(), labels=32 * self.rounds)


class Variant(NamedTuple):
    """When labels are asked for, and about what."""

    plan: Name


def one(cfg: Config, begun: Any, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """One plan: where its last policy is beside SFT, and the course of its last round of PPO."""
    task, sampler = begun
    rounds = 1 if variant.plan == "once" else cfg.rounds
    flags = iterate.Config(
        seed=seed, rounds=rounds, labels=cfg.labels // rounds, answers=8,
        choose="uncertain" if variant.plan in ("uncertain", "disagreement") else "random",
        members=3 if variant.plan == "disagreement" else 1, reward_model=cfg.reward_model, ppo=cfg.ppo,
    )  # fmt: skip
    label = iterate.world_labels(task, lambda prompts, number: sampler(task.base.params, prompts, number))
    *_, (number, policy, members, found) = iterate.run_rounds(flags, task, run, sampler, label, seed)
    scorer = make_reward_scorer(task, [iterate.make_reward(flags, task, members)], cfg.ppo.no_end_score)
    ends: dict[str, Any] = compare_policies(run, task, ("sft", task.base.params), ("policy", policy), sampler, scorer)
    ends["kl"] = make_policy_measure(task, sampler, task.eval_batch_size)(policy, task.base.params, 300)["kl_k1"]
    rows = read_metrics(run.dir)[f"ppo-{number}"]
    kl, utility = (smooth(np.array([row[name] for row in rows])) for name in ("kl_k1", "utility"))
    for nats in (3, 6):
        reached = np.flatnonzero(kl >= nats)
        if len(reached):
            ends[f"utility_at_{nats}"] = utility[reached[0]]
    return ends | {
        "val_accuracy": found[f"reward_model-{number}_val_accuracy"], "labels": found["labels"],
        "d_curve": np.sqrt(np.maximum(kl, 0)), "utility_curve": utility,
    }  # fmt: skip


def better(plan: Name, other: Name, name: str = "policy_utility") -> Any:
    """A number of one plan above another's."""
    return minus(of(name, plan=plan), of(name, plan=other))


CLAIMS = (
    Claim("labels of the last policy's answers are worth more", "Bai et al. 2022, fig. 16 and §4.5",
          "the online policy"
          " is preferred", better("random", "once"), "of true utility, three rounds above one", above=0.0),
    Claim("it holds at an equal distance", "Bai et al. 2022, §4.5", "fig. 16 compares snapshots, not equal KL",
          better("random", "once", "utility_at_6"), "of true utility at 6 nats", above=0.0),
    Claim("labels where the reward model is least certain are worth more still", "Christiano et al. 2017, §2.2.4",
          "in some tasks it helps, in some it harms", better("uncertain", "random"), "of true utility above labels at"
          " random", above=0.0),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a plan; true utility against √KL in the last round."""
    lines = [curve_line(cells, variant, "d_curve", "utility_curve", variant.plan) for variant in cells.finished()]
    panel = Panel("The last round of PPO", "√KL to SFT, √nats a response", "true utility", lines)
    return Page([variants_table(cells, ["labels"], COLUMNS)], [panel])


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each plan's means over seeds."""
    only_words(cfg)
    variants = [Variant(name) for name in cfg.plans]
    return run_grid(cfg, "rounds", variants, one, present, prepare=world_with_sft, axes=("plans",))


if __name__ == "__main__":
    run_main(main, Config)
