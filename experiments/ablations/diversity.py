"""RLHF lowers the diversity of answers to one prompt, and a larger KL term does not bring it back.

Kirk et al. 2024 (https://arxiv.org/abs/2310.06452) sample 16 answers to each prompt and count distinct n-grams, for
n = 1 to 5, over as many as would be expected of random words: within a prompt, and across prompts with one answer
each. PPO has far fewer than SFT within a prompt, and not many fewer across prompts; with a larger KL term it stays so.
    python experiments/ablations/diversity.py
Each seed has a world, an SFT policy and a reward model of its own. Of the best of 16 the 16 answers are each the best
of 16 others. Expect about 20 minutes on 2 CPU cores for 5 seeds.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations.claims import Claim, minus, of, times
from experiments.ablations.grid import GridFlags, run_grid, unused
from experiments.ablations.grid_results import Cells, Column, Page, Panel, points_line, variants_table
from experiments.ablations.kl_coefficient import prepare
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.sft import SFT
from rlhf_jax.best_of_n import sample_pools
from rlhf_jax.cli import run_main
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import at_least
from rlhf_jax.evaluate import best_of_n_kl
from rlhf_jax.log import Run

ANSWERS = 16
"""Answers to each prompt, and answers of which each of the best is picked."""
GRAMS = range(1, 6)
COLUMNS = (
    Column("distinct n-grams within a prompt", "within", 3), Column("across prompts", "across", 3),
    Column("different answers of 16", "different", 1), Column("true utility", "utility"), Column("KL, nats", "kl", 1),
    Column("length", "length", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """SFT, the best of 16, and PPO at several β, several seeds."""

    betas: tuple[float, ...] = (0.05, 0.1, 0.3, 1.0)
    prompts: int = 256
    """Held-out prompts."""
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=PPO)

    def __post_init__(self) -> None:
        """Raises UserError without prompts, and for a target of KL: β is what differs here."""
        at_least(self, prompts=2)
        unused(self.ppo, "ppo", "target_kl", "beta")
        super().__post_init__()


class Variant(NamedTuple):
    """A policy, and PPO's β; 0 for the others."""

    policy: Literal["sft", "best_of_16", "ppo"]
    beta: float


def one(cfg: Config, prepared: Any, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """The diversity of a policy's answers."""
    begun, train = prepared
    task, base, policy, kl = begun.task, begun.base, begun.base.params, 0.0
    if variant.policy == "ppo":
        policy, metrics, *_ = jax.tree.map(np.asarray, train(jax.random.key(seed + 2), jnp.float32(variant.beta)))
        kl = metrics["kl_k1"][-5:].mean()
    asked, tries = take(task.prompts().heldout, slice(cfg.prompts)), 1
    if variant.policy == "best_of_16":
        tries, kl = ANSWERS, float(best_of_n_kl(ANSWERS))
    texts, utilities = [], []
    for pool in sample_pools(
        lambda prompts: begun.sampler(policy, prompts, 0), begun.scorer, asked, ANSWERS * tries,
        rows=16 * task.eval_batch_size, judges={"utility": task.judge},
    ):  # fmt: skip
        best = np.arange(pool.scores.size).reshape(-1, tries)
        best = best[np.arange(len(best)), pool.scores.reshape(-1, tries).argmax(axis=1)]
        chosen = take(pool.answers, best)
        rows = [row[real].tolist() for row, real in zip(chosen.tokens, chosen.mask, strict=True)]
        texts += [rows[i : i + ANSWERS] for i in range(0, len(rows), ANSWERS)]
        utilities += pool.values["utility"].reshape(-1)[best].tolist()
    words = base.config.vocab_size
    return {
        "within": np.mean([expected_distinct(some, words) for some in texts]),
        "across": expected_distinct([some[0] for some in texts], words),
        "different": np.mean([len({tuple(row) for row in some}) for some in texts]),
        "utility": np.mean(utilities), "kl": kl, "length": np.mean([len(row) for some in texts for row in some]),
    }  # fmt: skip


def expected_distinct(texts: Sequence[Sequence[int]], words: int) -> float:
    """Distinct n-grams over those expected of as many random ones, the mean over n = 1 to 5.

        N / (V · (1 − ((V − 1) / V)ᶜ))   of N distinct n-grams among C, with V = wordsⁿ

    An n of which no text has an n-gram is left out. Reference: Liu et al. 2022, https://arxiv.org/abs/2202.13587; Kirk
    et al. 2024, https://arxiv.org/abs/2310.06452.
    Deviation: V is the number of possible n-grams, not of words, for all n.
    """
    found = []
    for n in GRAMS:
        grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
        if grams:
            possible = float(words) ** n
            found.append(len(set(grams)) / -(possible * np.expm1(len(grams) * np.log1p(-1 / possible))))
    return float(np.mean(found))


SFT_WITHIN, SFT_ACROSS = of("within", policy="sft"), of("across", policy="sft")
LOST = minus(SFT_WITHIN, of("within", policy="ppo", beta=0.1))
CLAIMS = (
    Claim("PPO lowers the diversity within a prompt", "Kirk et al. 2024", "far below SFT's", LOST,
          "of distinct n-grams below SFT's", above=0.05, digits=3),
    Claim("PPO lowers the diversity across prompts by less", "Kirk et al. 2024", "a smaller gap",
          minus(LOST, minus(SFT_ACROSS, of("across", policy="ppo", beta=0.1))), "of distinct n-grams", above=0.0,
          digits=3),
    Claim("three times the KL term brings back less than half of it", "Kirk et al. 2024, §6.3", "it falls further",
          minus(minus(of("within", policy="ppo", beta=0.3), of("within", policy="ppo", beta=0.1)), times(0.5, LOST)),
          "above half of what was lost", below=0.0, digits=3),
    Claim("the best of 16 keeps more diversity than PPO", "Kirk et al. 2024, fig. 6", "across prompts it keeps"
          " SFT's: the reward is not what costs it",
          minus(of("within", policy="best_of_16"), of("within", policy="ppo", beta=0.1)), "of distinct n-grams above"
          " PPO's", above=0.0, digits=3),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a policy; diversity within a prompt against true utility."""
    found = cells.finished()
    names = dict.fromkeys(variant.policy for variant in found)
    lines = [points_line(cells, [one for one in found if one.policy == name], "utility", "within", name)
             for name in names]  # fmt: skip
    panel = Panel("Diversity", "true utility", "distinct n-grams within a prompt", lines)
    return Page([variants_table(cells, ["policy", "β"], COLUMNS)], [panel])


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each policy's means over seeds."""
    variants = [Variant("sft", 0.0), Variant("best_of_16", 0.0), *(Variant("ppo", beta) for beta in cfg.betas)]
    return run_grid(cfg, "diversity", variants, one, present, prepare=prepare, axes=("betas",))


if __name__ == "__main__":
    run_main(main, Config)
