"""Reward models of more and fewer labels: their agreement, and how far the best of n can go by them.

Ouyang et al. 2022, §3.5 (https://arxiv.org/abs/2203.02155) rank K answers to a prompt and learn all pairs at once. Gao
et al. 2023 (https://arxiv.org/abs/2210.10760) find reward models of fewer than about 2,000 comparisons near chance,
and that the best of n by a proxy gains R(d) = d(α − βd) of true reward at d = √KL; more data help, though not as
cleanly as a larger reward model does. Pal et al. 2024 (https://arxiv.org/abs/2402.13228) find that pairs which differ
in few tokens mislead DPO. Such pairs are also nearer in utility here, and their labels are noisier. Each seed has a
world and an SFT policy of its own; the reward models learn parts of the same rankings, and of one size the two answers
of eight that differ in the fewest tokens.
    python experiments/ablations/reward_data.py
Expect about 20 minutes on 2 CPU cores for 5 seeds.
"""

import sys
from dataclasses import dataclass, field
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from experiments import reward_model
from experiments.ablations.claims import Claim, minus, of
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, curve_line, points_line, variants_table
from experiments.ablations.worlds import AfterSFT, after_sft, sft_pool
from experiments.reward_model import RewardModel
from experiments.sft import SFT
from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.best_of_n import best_of_n_metrics, powers_up_to, sample_pools
from rlhf_jax.cli import run_main
from rlhf_jax.data.encode import RankedAnswers
from rlhf_jax.data.preferences import reordered
from rlhf_jax.diagnostics import best_of_n_fit
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.log import Run
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.tasks.measure import AnswerScorer, make_reward_scorer
from rlhf_jax.tasks.simulated import SIZES, World

NO_END = -3.0
COLUMNS = (
    Column("labels", "labels", 0), Column("held-out agreement", "val_accuracy", 3), Column("ceiling", "ceiling", 3),
    Column("above chance, share", "share_above_chance", 3), Column("best of n: most gained", "gain"),
    Column("α", "alpha"), Column("β", "beta"), Column("R²", "r2"),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """Reward models of parts of the rankings, several seeds."""

    sizes: tuple[str, ...] = ("2x250", "2x1000", "2x4000", "2x12000", "8x1000", "8x12000")
    """ANSWERSxPROMPTS."""
    near: tuple[str, ...] = ("2x4000",)
    """The sizes of those that learn the two nearest of a prompt's answers."""
    n: int = 64
    """The most answers of which the best is picked."""
    prompts: int = 256
    """Prompts on which it is."""
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)

    def __post_init__(self) -> None:
        """Raises UserError for sizes that are none, and for too few answers."""
        at_least(self, n=8, prompts=1)  # of fewer answers there is no curve to fit
        for size in (*self.sizes, *self.near):
            answers, _, prompts = size.partition("x")
            if not (answers.isdecimal() and prompts.isdecimal()):
                raise UserError(f"--sizes: {size!r} is not ANSWERSxPROMPTS, as in 8x1000")
            if not (2 <= int(answers) <= SIZES.ranked and 1 <= int(prompts) <= SIZES.compared):
                raise UserError(f"--sizes: {size!r} is not within 2x1 and the world's {SIZES.ranked}x{SIZES.compared}")
        if wide := [size for size in self.near if not size.startswith("2x")]:
            raise UserError(f"--near: {wide[0]!r} is not of pairs, as 2x4000 is")
        super().__post_init__()


class Variant(NamedTuple):
    """How many answers to how many prompts are ranked, and which: the first of eight, or the two nearest."""

    size: str
    picked: Literal["first", "nearest"] = "first"


class Prepared(NamedTuple):
    """A seed's world and SFT, held-out prompts, each n times, and an answer to each: all models pick among these."""

    begun: AfterSFT
    heldout: Prompts
    answers: Completions


def prepare(cfg: Config, seed: int, run: Run) -> Prepared:
    """A world, SFT, comparisons, and the answers that the best is picked of."""
    begun = after_sft(cfg, seed, run)
    return Prepared(begun, *sft_pool(cfg, begun.task, begun.sampler, seed, cfg.n, cfg.prompts))


def one(cfg: Config, prepared: Prepared, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """A reward model, and the best of n by it."""
    answers, prompts = map(int, variant.size.split("x"))
    begun, heldout, sampled = prepared
    task, everything = begun.task, begun.comparisons
    pick = nearest if variant.picked == "nearest" else lambda _: range(answers)
    rankings = [reordered(ranking, pick(ranking)) for ranking in everything.train[:prompts]]
    params, found = reward_model.train(
        cfg.reward_model, begun.base, everything._replace(train=rankings), run, seed,
        eval_batch_size=task.eval_batch_size, zero=task.demonstrations().validation,
    )  # fmt: skip
    reward = model_reward(begun.base.config, params, name="reward_model", weight=1.0)
    picked = best_of_pool(task, make_reward_scorer(task, [reward], NO_END), heldout, sampled, cfg.n)
    own = {name.removeprefix("reward_model_"): value for name, value in found.items()}
    return {
        name: own[name] for name in ("val_accuracy", "ceiling", "share_above_chance")
    } | {
        "labels": answers * len(rankings), "log_labels": np.log10(answers * len(rankings)), **picked,
    }  # fmt: skip


def best_of_pool(task: World, score: AnswerScorer, heldout: Prompts, sampled: Completions, n: int) -> dict[str, Any]:
    """The best of 1, 2, 4, … n by a score, from n answers to each held-out prompt: true utility, and Gao et al.'s fit.

    Distances are in √nats; gains are of true utility, above that of one answer.
    """
    (pool,) = sample_pools(
        lambda *_: sampled, score, heldout, n, rows=len(sampled.mask), judges={"utility": task.judge}
    )  # fmt: skip
    curve = [best_of_n_metrics(pool, number) for number in powers_up_to(n)]
    kl, gold = (np.array([point[name] for point in curve]) for name in ("kl_bound", "utility"))
    fit = best_of_n_fit(kl, gold - gold[0])
    return {
        "gain": gold.max() - gold[0], "alpha": fit.alpha, "beta": fit.beta, "r2": fit.r2,
        "distance": np.sqrt(kl), "gold": gold, "proxy": np.array([point["score"] for point in curve]),
    }  # fmt: skip


def nearest(ranking: RankedAnswers) -> tuple[int, int]:
    """The two answers of a prompt that differ in the fewest places, and in one at least if any do."""

    def apart(pair: tuple[int, int]) -> float:
        some = [ranking.responses[i] for i in pair]
        return sum(a != b for a, b in zip_longest(*some)) or np.inf

    return min(combinations(range(len(ranking.responses)), 2), key=apart)


MOST = "8x12000"
CLAIMS = (
    Claim("few comparisons teach next to nothing", "Gao et al. 2023, §3.3", "near chance below about 2,000",
          of("share_above_chance", size="2x250"), "of what can be had above chance, by 250 pairs", below=0.25),
    Claim("more labels, better agreement", "Gao et al. 2023; Stiennon et al. 2020", "twice the data: 1.1 points more",
          minus(of("val_accuracy", size="2x12000"), of("val_accuracy", size="2x1000")), "of agreement, 12 times the"
          " labels", above=0.0, digits=3),
    Claim("rankings of eight are worth pairs of as many labels", "Ouyang et al. 2022, §3.5",
          "all pairs of K answers as one batch element: better and faster",
          minus(of("val_accuracy", size="8x1000"), of("val_accuracy", size="2x4000")), "of agreement, 8,000 labels"
          " each", above=0.0, digits=3),
    Claim("α of the best of n grows with the data", "Gao et al. 2023, §3.3", "more is better, if less cleanly",
          minus(of("alpha", size=MOST), of("alpha", size="2x1000")), above=0.0),
    Claim("pairs that are nearly the same teach less", "Pal et al. 2024 (of DPO)", "few tokens that differ mislead",
          minus(of("val_accuracy", size="2x4000", picked="nearest"), of("val_accuracy", size="2x4000",
                picked="first")), "of agreement, 4,000 pairs each", below=0.0, digits=3),
    Claim("the best of n gains d(α − βd)", "Gao et al. 2023, §1 and fig. 1", "fits well, and foretold"
          " n = 60,000 from 1,000", of("r2", size=MOST), "R²",
          above=0.9),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a size; agreement against labels, and true utility of the best of n against the distance."""
    found = [variant for variant in cells.finished() if variant.picked == "first"]
    shown = [points_line(cells, [one for one in found if one.size.startswith(answers)], "log_labels", "val_accuracy",
                         f"{answers} answers") for answers in ("2", "8")
             if any(one.size.startswith(answers) for one in found)]  # fmt: skip
    curves = [curve_line(cells, variant, "distance", "gold", variant.size) for variant in found]
    panels = [
        Panel("Agreement", "log₁₀ labels", "held-out agreement", shown),
        Panel("The best of n", "√KL, √nats", "true utility", curves),
    ]
    return Page([variants_table(cells, ["answers x prompts", "answers"], COLUMNS)], panels)


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each size's means over seeds."""
    variants = [Variant(size) for size in cfg.sizes] + [Variant(size, "nearest") for size in cfg.near]
    return run_grid(cfg, "reward_data", variants, one, present, prepare=prepare, axes=("sizes", "near"))


if __name__ == "__main__":
    run_main(main, Config)
