"""RL from a checker: six algorithms without a critic, DAPO with one clip, and PPO, on about as many answers each.

In the controlled world. The checker says whether an answer is right, and nothing of its form, tone or length, which
the true utility counts, too. Each seed has a world and an SFT policy of its own; every algorithm starts from it and
samples 128 answers an iteration. DAPO samples until it has enough groups with a signal: it is asked for half as many
groups, and the table has the answers that were sampled.
    python experiments/ablations/verifiable.py
It takes about half an hour on 2 CPU cores for 5 seeds. It writes a table and a figure: right answers and the true
utility as training goes on. Expect right answers to become more, and form and tone to stay what SFT made them.
"""

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from experiments import cispo, dapo, dr_grpo, grpo, gspo, ppo, rloo
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, curve_line, smooth, variants_table
from experiments.ablations.worlds import world_with_sft
from experiments.ppo import PPO
from experiments.sft import SFT
from experiments.stages import train_without_critic
from rlhf_jax.cli import run_main
from rlhf_jax.errors import at_least
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.tasks.measure import compare_policies, make_policy_measure, make_reward_scorer

Name = Literal["grpo", "dr_grpo", "dapo", "dapo_one_clip", "gspo", "cispo", "rloo", "ppo"]
METHODS: dict[str, tuple[Any, Any]] = {
    "grpo": (grpo, grpo.GRPO), "dr_grpo": (dr_grpo, dr_grpo.DrGRPO), "dapo": (dapo, dapo.DAPO),
    "dapo_one_clip": (dapo, partial(dapo.DAPO, clip_eps_high=dapo.DAPO.clip_eps_low)),
    "gspo": (gspo, gspo.GSPO), "cispo": (cispo, cispo.CISPO), "rloo": (rloo, rloo.RLOO),
}  # fmt: skip
COLUMNS = tuple(
    Column(head, name, digits)
    for head, name, digits in (
        ("right, held out", "policy_score", 3), ("SFT", "sft_score", 3), ("true utility", "policy_utility", 2),
        ("SFT's", "sft_utility", 2), ("beats SFT", "win_rate", 3), ("KL to SFT, held out, nats", "kl", 2),
        ("entropy, nats a token", "entropy", 3), ("length", "length", 2), ("of right ones", "length_right", 2),
        ("of wrong ones", "length_wrong", 2), ("groups without signal", "silent", 3), ("answers", "answers", 0),
        ("seconds", "seconds", 0),
    )
)  # fmt: skip
LAST = 5
"""Iterations at the end whose mean stands in the table."""


@dataclass(frozen=True)
class Config(GridFlags):
    """Algorithms with the same checker, several seeds."""

    algorithms: tuple[Name, ...] = ("grpo", "dr_grpo", "dapo", "dapo_one_clip", "gspo", "cispo", "rloo", "ppo")
    """dapo_one_clip is DAPO whose upper clip is its lower one, 0.2 instead of 0.28."""
    steps: int = 60
    """Iterations; of PPO, too."""
    sft: SFT = field(default_factory=SFT)

    def __post_init__(self) -> None:
        at_least(self, steps=LAST)
        super().__post_init__()


class Variant(NamedTuple):
    """An algorithm, with the numbers of its file."""

    algorithm: str


def one(cfg: Config, begun: Any, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """One algorithm: where it ends beside SFT, and its curves."""
    task, sampler = begun
    base = task.base
    rewards = [task.checker()]
    if variant.algorithm == "ppo":
        flags = PPO(steps=cfg.steps, responses=128)
        policy, _ = ppo.train(
            flags, base, task.prompts(), rewards, run, seed, max_new_tokens=task.max_new_tokens, judge=task.judge
        )
    else:
        module, flags_of = METHODS[variant.algorithm]
        flags = flags_of(steps=cfg.steps)
        if module is dapo:
            flags = replace(flags, groups=flags.groups // 2)
        algorithm = module.algorithm(flags, flags.numbers(task.max_new_tokens))
        policy, _ = train_without_critic(flags, algorithm, task, base, rewards, run, seed, stage=variant.algorithm)
    rows = read_metrics(run.dir)[variant.algorithm]
    found: dict[str, Any] = compare_policies(
        run, task, ("sft", base.params), ("policy", policy), sampler, make_reward_scorer(task, rewards, None)
    )
    found["kl"] = make_policy_measure(task, sampler, task.eval_batch_size)(policy, base.params, 300)["kl_k1"]
    for name in ("entropy", "length", "length_right", "length_wrong", "silent"):
        values = [row[name] for row in rows[-LAST:] if row.get(name) is not None]
        if values:
            found[name] = np.mean(values)
    groups = sum(row.get("groups", 16) for row in rows)
    right = [row["reward/correct/mean"] for row in rows]
    return found | {
        "answers": 8 * groups, "seconds": sum(row["seconds"] for row in rows[1:]),
        "right_curve": smooth(np.array(right)), "utility_curve": smooth(np.array([row["utility"] for row in rows])),
    }  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row an algorithm; right answers and true utility as training goes on."""
    found = cells.finished()
    right, truth = (
        [curve_line(cells, variant, None, name, variant.algorithm) for variant in found]
        for name in ("right_curve", "utility_curve")
    )
    panels = [
        Panel("Right answers", "iteration", "share of sampled answers", right),
        Panel("Truth", "iteration", "true utility", truth),
    ]
    return Page([variants_table(cells, ["algorithm"], COLUMNS)], panels)


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each algorithm's means over seeds."""
    variants = [Variant(name) for name in cfg.algorithms]
    return run_grid(cfg, "verifiable", variants, one, present, prepare=world_with_sft, axes=("algorithms",))


if __name__ == "__main__":
    run_main(main, Config)
