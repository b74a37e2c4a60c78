"""The worth of each part of PPO: the critic's start, whitening, clips, epochs, λ; and RLOO, which has no critic.

Ahmadian et al. 2024 (https://arxiv.org/abs/2402.14740) find that for language models λ → 1 is best, that the clip
hardly ever acts, and that REINFORCE with a leave-one-out baseline beats PPO. Huang et al. 2024
(https://arxiv.org/abs/2403.17031) list what a PPO of Stiennon et al.'s kind is made of. Each seed has a world, an SFT
policy and a reward model of its own; each variant differs from the default in one flag.
    python experiments/ablations/ppo_details.py
Expect about 25 minutes on 2 CPU cores for 5 seeds.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ppo, rloo
from experiments.ablations.claims import Claim, minus, of
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, curve_line, variants_table
from experiments.ablations.worlds import AfterRewardModel, after_reward_model
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.rloo import RLOO
from experiments.sft import SFT
from experiments.stages import train_without_critic
from rlhf_jax.cli import run_main
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import from_language_model
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.tasks.measure import compare_policies

NO_CLIP = 1e6
CHANGES: dict[str, dict[str, Any]] = {
    "default": {}, "critic_from_the_policy": {}, "critic_of_zeros": {}, "no_whitening": {"whiten": False},
    "no_value_clip": {"value_clip_eps": NO_CLIP}, "no_clip": {"clip_eps": NO_CLIP}, "one_epoch": {"epochs": 1},
    "four_epochs": {"epochs": 4}, "lambda_1": {"lam": 1.0}, "lambda_0": {"lam": 0.0},
}  # fmt: skip
"""The flags in which each variant of PPO differs from the default. A critic from the policy has a new head."""
COLUMNS = (
    Column("true utility", "policy_utility"), Column("beats SFT", "win_rate", 3), Column("proxy", "policy_score"),
    Column("KL, nats", "kl", 1), Column("ratios clipped", "clip_fraction", 3),
    Column("critic explains at first", "explained_first"), Column("at the end", "explained_last"),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """PPO without one of its parts at a time, and RLOO, several seeds."""

    parts: tuple[str, ...] = (*CHANGES, "rloo")
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=PPO)


class Variant(NamedTuple):
    """The part that is another one."""

    part: str


def one(cfg: Config, begun: AfterRewardModel, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """Where a variant ends beside SFT, after as many answers."""
    task, base = begun.task, begun.base
    rewards = [model_reward(base.config, begun.rewards, name="reward_model", weight=1.0)]
    if variant.part == "rloo":
        flags = ppo.with_defaults(cfg.ppo, base)
        groups = RLOO(steps=flags.steps, groups=(flags.responses or 0) // 4, group_size=4, beta=cfg.ppo.beta)
        algorithm = rloo.algorithm(groups, groups.numbers(task.max_new_tokens))
        policy, _ = train_without_critic(groups, algorithm, task, base, rewards, run, seed, stage="rl")
    else:
        flags = replace(cfg.ppo, **CHANGES[variant.part])
        critic = base.config, begun.rewards
        if variant.part == "critic_of_zeros":
            new = from_language_model(base.params, jax.random.key(seed), base.config)
            critic = base.config, new | {"head": jax.tree.map(jnp.zeros_like, new["head"])}
        policy, _ = ppo.train(
            flags, base, task.prompts(), rewards, run, seed, max_new_tokens=task.max_new_tokens,
            critic=None if variant.part == "critic_from_the_policy" else critic, judge=task.judge, stage="rl",
        )  # fmt: skip
    rows = read_metrics(run.dir)["rl"]
    found = begun.facts | compare_policies(
        run, task, ("sft", base.params), ("policy", policy), begun.sampler, begun.scorer
    )
    names = ("kl_k1", "clip_fraction", "utility")
    curves = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
    explained = [row["explained_variance"] for row in rows if "explained_variance" in row] or [np.nan]
    return found | {
        "kl": curves["kl_k1"][-5:].mean(), "clip_fraction": curves["clip_fraction"].mean(), "curve": curves["utility"],
        "explained_first": explained[0], "explained_last": np.mean(explained[-5:]),
    }  # fmt: skip


def ends_above(part: str, other: str = "default") -> Any:
    """True utility of a variant above another's."""
    return minus(of("policy_utility", part=part), of("policy_utility", part=other))


CLAIMS = (
    Claim("λ = 1 is as good as 0.95", "Ahmadian et al. 2024, fig. 1", "λ → 1 is best", ends_above("lambda_1"),
          "of true utility", above=-0.1),
    Claim("λ = 0 is worse", "Ahmadian et al. 2024, fig. 1", "bias costs more than variance", ends_above("lambda_0"),
          "of true utility", below=0.0),
    Claim("the clip hardly acts", "Ahmadian et al. 2024, §3.2", "less than 5% of the time", of("clip_fraction",
          part="default"), "of ratios", below=0.05, digits=3),
    Claim("without it nothing is lost", "Ahmadian et al. 2024, §3.2", "a slight boost", ends_above("no_clip"),
          "of true utility", above=-0.1),
    Claim("RLOO beats PPO", "Ahmadian et al. 2024, table 1", "by 10 to 32 points of wins, k = 4", ends_above("rloo"),
          "of true utility", above=0.0),
    Claim("a critic from the reward model knows more at first", "Ouyang et al. 2022, app. C; Huang et al. 2024",
          "it starts there", minus(of("explained_first", part="default"),
                                   of("explained_first", part="critic_from_the_policy")),
          "of explained variance", above=0.0),
    Claim("and the policy is better for it", "Ouyang et al. 2022", "not told", ends_above("default",
          "critic_from_the_policy"), "of true utility", above=0.0),
    Claim("how a new head begins does not matter", "Ziegler et al. 2019, code; Huang et al. 2024",
          "zeros for the value's head, 1/√(d + 1) for the reward's", ends_above("critic_of_zeros",
          "critic_from_the_policy"),
          "of true utility", above=-0.1, below=0.1),
    Claim("without whitening nothing is lost", "Andrychowicz et al. 2021", "it hardly matters",
          ends_above("no_whitening"), "of true utility", above=-0.1),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a variant; true utility by iteration."""
    lines = [curve_line(cells, variant, None, "curve", variant.part) for variant in cells.finished()]
    panel = Panel("PPO without one of its parts", "iteration", "true utility", lines)
    return Page([variants_table(cells, ["part"], COLUMNS)], [panel])


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each variant's means over seeds."""
    variants = [Variant(part) for part in cfg.parts]
    return run_grid(cfg, "ppo_details", variants, one, present, prepare=after_reward_model, axes=("parts",))


if __name__ == "__main__":
    run_main(main, Config)
