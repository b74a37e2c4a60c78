"""RL from a checker: six algorithms without a critic, DAPO with one clip, and PPO, on about as many answers each.

The checker says whether an answer is right, and nothing of its form, tone or length, which the true utility counts,
too. Each seed has a world and an SFT policy of its own; every algorithm starts from it and samples 128 answers an
iteration. DAPO samples until it has enough groups with a signal: it is asked for half as many groups, and the table
has the answers that were sampled. Right answers in k tries are of prompts with longer lists than any that was learned,
where there is room; the law R = b − a·exp(H), of right answers and entropy, is fitted to a first part of the training.
    python experiments/ablations/verifiable.py
It takes about half an hour on 2 CPU cores for 5 seeds.
"""

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax.numpy as jnp
import numpy as np

from experiments import cispo, dapo, dr_grpo, grpo, gspo, ppo, rloo
from experiments.ablations.claims import Claim, minus, of
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, curve_line, smooth, variants_table
from experiments.ablations.worlds import world_with_sft
from experiments.dr_grpo import DrGRPO
from experiments.grpo import GRPO
from experiments.ppo import PPO
from experiments.sft import SFT
from experiments.stages import train_without_critic
from rlhf_jax.advantages import group_advantages
from rlhf_jax.best_of_n import sample_pools
from rlhf_jax.cli import run_main
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import at_least
from rlhf_jax.evaluate import pass_at_k
from rlhf_jax.groups import Algorithm, Numbers
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.tasks.measure import PolicySampler, compare_policies, make_policy_measure, make_reward_scorer
from rlhf_jax.tasks.simulated import World
from rlhf_jax.types import Params

Name = Literal["grpo", "dr_grpo", "dr_grpo_by_length", "dapo", "dapo_one_clip", "gspo", "cispo", "rloo", "ppo"]


def by_length(flags: DrGRPO, numbers: Numbers) -> Algorithm:
    """Dr. GRPO with the loss of each answer over its own tokens, 1/|o|, as GRPO has it."""
    other = grpo.algorithm(GRPO(beta=0.0, clip_eps=flags.clip_eps), numbers)
    return dr_grpo.algorithm(flags, numbers)._replace(loss=other.loss, averaged=other.averaged)


METHODS: dict[str, tuple[Any, Any]] = {
    "grpo": (grpo, GRPO), "dr_grpo": (dr_grpo, DrGRPO),
    "dr_grpo_by_length": (SimpleNamespace(algorithm=by_length), DrGRPO), "dapo": (dapo, dapo.DAPO),
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
        ("longer lists: right at once", "pass_1", 3), ("SFT's", "sft_pass_1", 3), ("in 64 tries", "pass_64", 3),
        ("SFT's", "sft_pass_64", 3), ("R² of the entropy law", "law_r2", 2), ("its error ahead", "law_error", 3),
        ("seconds", "seconds", 0),
    )
)  # fmt: skip
LAST = 5
"""Iterations at the end whose mean stands in the table."""
TRIES, GROUP = 64, 8
"""Answers to each prompt for right answers in k tries, and answers of a group."""
EARLY = 1 / 3
"""The part of the training that the entropy law is fitted to; of Cui et al. 36 steps of 236, each of more answers."""


@dataclass(frozen=True)
class Config(GridFlags):
    """Algorithms with the same checker, several seeds."""

    algorithms: tuple[Name, ...] = get_args(Name)
    """dr_grpo_by_length has GRPO's 1/|o|; dapo_one_clip is DAPO whose upper clip is its lower one, 0.2, not 0.28."""
    steps: int = 60
    """Iterations; of PPO, too."""
    sft: SFT = field(default_factory=SFT)

    def __post_init__(self) -> None:
        at_least(self, steps=LAST)
        super().__post_init__()

    def hurried(self) -> Any:
        """The flags of a quick run."""
        return replace(super().hurried(), steps=6)


class Variant(NamedTuple):
    """An algorithm, with the numbers of its file."""

    algorithm: str


class Begun(NamedTuple):
    """A seed's world with SFT, and what SFT's answers are worth to the checker."""

    task: World
    sampler: PolicySampler
    facts: dict[str, float]


def prepare(cfg: Config, seed: int, run: Run) -> Begun:
    """A world and SFT, its right answers in k tries, and what dividing by a group's std does to its groups."""
    task, sampler = world_with_sft(cfg, seed, run)
    right = tried(task, sampler, task.base.params, 200)
    shares = {name: extreme_share(right.reshape(-1, GROUP), std) for name, std in (("std", True), ("no_std", False))}
    facts = {f"sft_pass_{k}": pass_at_k(right.sum(axis=1), TRIES, k).mean() for k in (1, TRIES)}
    return Begun(task, sampler, facts | {f"extreme_{name}": share for name, share in shares.items()})


def tried(task: World, sampler: PolicySampler, policy: Params, number: int) -> np.ndarray:
    """Whether each of so many tries at prompts with longer lists is right: [prompts, tries] of 0 and 1."""
    shifted = task.prompts().shifted
    assert shifted is not None
    score = make_reward_scorer(task, [task.checker()], None)
    pools = sample_pools(
        lambda prompts: sampler(policy, prompts, number), score, take(shifted, slice(256)), TRIES,
        rows=8 * task.eval_batch_size,
    )  # fmt: skip
    return np.concatenate([pool.scores for pool in pools])


def extreme_share(right: np.ndarray, scale_by_std: bool) -> float:
    """The share of all |advantage| that groups with one right or one wrong answer have. `right` is [groups, G]."""
    rewards = jnp.asarray(right.reshape(-1), jnp.float32)
    advantages = np.asarray(group_advantages(rewards, group_size=right.shape[1], scale_by_std=scale_by_std))
    weights = np.abs(advantages).reshape(right.shape).sum(axis=1)
    extreme = np.isin(right.sum(axis=1), (1, right.shape[1] - 1))
    return float(weights[extreme].sum() / weights.sum())


def entropy_law(entropy: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Cui et al.'s law R = b − a·exp(H), by least squares.

    `law_r2` is R² of a fit to all iterations, below 0 where right answers rise with entropy (a < 0); `law_error` how
    far a fit to the first part misses the last ones.
    """
    features = np.stack([np.ones_like(entropy), -np.exp(entropy)], axis=1)
    early = max(3, int(EARLY * len(right)))
    fits = [np.linalg.lstsq(features[:n], right[:n])[0] for n in (len(right), early)]
    everywhere, ahead = (features @ fit for fit in fits)
    r2 = float(1 - np.sum((right - everywhere) ** 2) / np.sum((right - right.mean()) ** 2))
    return {
        "law_r2": r2 if fits[0][1] > 0 else -abs(r2),
        "law_error": float(abs(ahead[-LAST:].mean() - right[-LAST:].mean())),
    }


def one(cfg: Config, begun: Begun, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """One algorithm: where it ends beside SFT, and its curves."""
    task, sampler, facts = begun
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
    right = np.array([row["reward/correct/mean"] for row in rows])
    tries = tried(task, sampler, policy, 400).sum(axis=1)
    found |= facts | {f"pass_{k}": pass_at_k(tries, TRIES, k).mean() for k in (1, TRIES)}
    return found | entropy_law(np.array([row["entropy"] for row in rows]), right) | {
        "answers": 8 * groups, "seconds": sum(row["seconds"] for row in rows[1:]),
        "right_curve": smooth(right), "utility_curve": smooth(np.array([row["utility"] for row in rows])),
    }  # fmt: skip


def differ(name: str, first: str, second: str) -> Any:
    """A number of an algorithm above another's."""
    return minus(of(name, algorithm=first), of(name, algorithm=second))


CLAIMS = (
    Claim("1/|o| lengthens wrong answers", "Liu et al. 2025 (Dr. GRPO), fig. 5", "wrong answers are much longer"
          " than by Dr. GRPO, which leaves out the std, too", differ("length_wrong", "dr_grpo_by_length", "dr_grpo"),
          "tokens a wrong answer, Dr. GRPO"
          " with 1/|o| above without", above=0.0),
    Claim("the std favours easy and hard prompts", "Liu et al. 2025 (Dr. GRPO), §3.1", "they weigh more",
          minus(of("extreme_std", algorithm="grpo"), of("extreme_no_std", algorithm="grpo")), "of all advantage, in"
          " SFT's groups with one right or one wrong answer", above=0.0, digits=3),
    Claim("the higher clip holds the entropy", "Yu et al. 2025 (DAPO), fig. 2", "it collapses without",
          differ("entropy", "dapo", "dapo_one_clip"), "nats a token", above=0.0, digits=3),
    Claim("right answers are b − a·exp(entropy)", "Cui et al. 2025", "fits four families of models", of("law_r2",
          algorithm="grpo"), "R²", above=0.8),
    Claim("a fit to the first third tells the end", "Cui et al. 2025, fig. 5", "36 of 236 steps do, within 0.5"
          " points in math and 1.9 in code",
          of("law_error", algorithm="grpo"), "of answers", below=0.05, digits=3),
    Claim("RL has more right answers at once", "Yue et al. 2025, fig. 2", "pass@1 rises",
          minus(of("pass_1", algorithm="grpo"), of("sft_pass_1", algorithm="grpo")), "of answers, longer lists",
          above=0.0, digits=3),
    Claim("and fewer prompts that are solved at all", "Yue et al. 2025, fig. 2", "pass@k crosses at tens to hundreds",
          minus(of("pass_64", algorithm="grpo"), of("sft_pass_64", algorithm="grpo")), "of prompts in 64 tries, longer"
          " lists", below=0.0, digits=3),
)  # fmt: skip


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
    return run_grid(cfg, "verifiable", variants, one, present, prepare=prepare, axes=("algorithms",))


if __name__ == "__main__":
    run_main(main, Config)
