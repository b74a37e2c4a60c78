"""An adaptive β holds its KL; three ways in which it does not, and how these are told from hacking and collapse.

Ziegler et al. 2019, §2.2 (https://arxiv.org/abs/1909.08593) multiply β by 1 + 0.1 · clip(KL / target − 1, ±0.2); in
their code, as here, batch / horizon stands for 0.1. The controller fails on purpose where the horizon is so long that
β hardly moves, where it is so short that β over-reacts, and where the batch is so small that β follows the noise of
its KL. A far target is hacking instead: the true utility falls, with answers that differ. A learning rate of ten times
was to be collapse, where prompts get each other's answers. Each seed has a world, an SFT policy and a reward model of
its own.
    python experiments/ablations/adaptive_kl.py
Expect about 15 minutes on 2 CPU cores for 5 seeds.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from experiments import ppo
from experiments.ablations.claims import Claim, minus, of
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, curve_line, smooth, variants_table
from experiments.ablations.worlds import AfterRewardModel, after_reward_model
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.sft import SFT
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.tasks.measure import compare_policies, make_policy_measure

TARGET, FAR = 6.0, 30.0
"""Nats: one that is good, and one where the reward model is hacked."""
Way = Literal["held", "long_horizon", "short_horizon", "small_batch", "far_target", "collapse"]
CHANGES: dict[Way, dict[str, Any]] = {
    "held": {}, "long_horizon": {"kl_horizon": 1e6}, "short_horizon": {"kl_horizon": 26.0},
    "small_batch": {"responses": 8, "minibatches": 1, "kl_horizon": 31.25}, "far_target": {"target_kl": FAR},
    "collapse": {"learning_rate": 5e-3},
}  # fmt: skip
"""The flags in which each variant differs from the first. A small batch has the same batch / horizon."""
COLUMNS = (
    Column("KL, last third, nats", "kl", 1), Column("its mean from the target, share", "off"),
    Column("β at the end", "beta", 3), Column("std of log β, last third", "swing", 3), Column("proxy", "policy_score"),
    Column("true utility", "policy_utility"), Column("below its peak", "fallen"),
    Column("copies of answers to other prompts", "duplicates", 3), Column("entropy, nats a token", "entropy", 3),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """PPO with an adaptive β, held and not, several seeds."""

    ways: tuple[Way, ...] = get_args(Way)
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=lambda: PPO(steps=120, target_kl=TARGET, kl_horizon=500.0))

    def __post_init__(self) -> None:
        """Raises UserError without a target, and for flags of PPO with which a way cannot be run."""
        super().__post_init__()
        if self.ppo.target_kl is None:
            raise UserError("--ppo.target-kl is what β is held to: give a number")
        for way in self.ways:
            replace(self.ppo, **CHANGES[way])


class Variant(NamedTuple):
    """A way in which PPO is run."""

    way: Way


def one(cfg: Config, begun: AfterRewardModel, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """Where PPO ends beside SFT, how near its KL was to the target, and how β went."""
    task, base = begun.task, begun.base
    rewards = [model_reward(base.config, begun.rewards, name="reward_model", weight=1.0)]
    flags = replace(cfg.ppo, **CHANGES[variant.way])
    policy, _ = ppo.train(
        flags, base, task.prompts(), rewards, run, seed, max_new_tokens=task.max_new_tokens,
        critic=(base.config, begun.rewards), judge=task.judge,
    )  # fmt: skip
    rows = read_metrics(run.dir)["ppo"]
    curves = (np.array([row[name] for row in rows]) for name in ("kl_k1", "beta", "utility", "entropy"))
    kl, beta, utility, entropy = curves
    last = slice(2 * len(rows) // 3, None)
    assert flags.target_kl is not None
    found = compare_policies(run, task, ("sft", base.params), ("policy", policy), begun.sampler, begun.scorer)
    measured = make_policy_measure(task, begun.sampler, task.eval_batch_size)(policy, base.params, 300)
    return found | {
        "kl": kl[last].mean(), "off": abs(kl[last].mean() / flags.target_kl - 1), "beta": beta[-1],
        "swing": np.log(beta[last]).std(), "fallen": smooth(utility).max() - found["policy_utility"],
        "duplicates": measured["duplicates"], "entropy": entropy[last].mean(), "kl_curve": smooth(kl),
        "beta_curve": beta,
    }  # fmt: skip


def differ(name: str, way: str, other: str = "held") -> Any:
    """A number of one way above another's."""
    return minus(of(name, way=way), of(name, way=other))


CLAIMS = (
    Claim("an adaptive β holds its KL", "Ziegler et al. 2019, §2.2", "it targets a value of KL", of("off", way="held"),
          "of the target away", below=0.2),
    Claim("with a long horizon an adaptive β does not hold its KL", "this project", "β hardly moves",
          differ("off", "long_horizon"), "of the target further away", above=0.2),
    Claim("with a short horizon β does not settle", "this project", "a controller with too much gain", differ("swing",
          "short_horizon"), "of std of log β", above=0.1),
    Claim("with a small batch β does not settle", "this project", "the KL of a few answers", differ("swing",
          "small_batch"), "of std of log β", above=0.1),
    Claim("a far target is hacking", "Gao et al. 2023", "the reward rises, the truth falls",
          differ("fallen", "far_target"), "of true utility below its peak, above that of the good target", above=0.2),
    Claim("answers that hack the reward still differ", "this project", "no collapse", of("duplicates",
          way="far_target"), "of answers are copies", below=0.2),
    Claim("ten times the learning rate has more copies than hacking", "this project", "one answer to many prompts",
          differ("duplicates", "collapse", "far_target"), "of answers", above=0.3),
    Claim("a short horizon costs no true utility", "this project", "the policy is as good", differ("policy_utility",
          "short_horizon"), "of true utility, short horizon above held", above=-0.2),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a way; KL and β by iteration."""
    panels = [
        Panel(title, "iteration", ylabel, [curve_line(cells, one, None, name, one.way) for one in cells.finished()])
        for title, ylabel, name in (
            ("KL to SFT", "nats", "kl_curve"),
            ("The weight of the KL term", "β", "beta_curve"),
        )
    ]
    return Page([variants_table(cells, ["PPO"], COLUMNS)], panels)


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each way's means over seeds."""
    variants = [Variant(way) for way in cfg.ways]
    return run_grid(cfg, "adaptive_kl", variants, one, present, prepare=after_reward_model, axes=("ways",))


if __name__ == "__main__":
    run_main(main, Config)
