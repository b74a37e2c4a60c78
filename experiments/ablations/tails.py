"""Where a reward's error has heavy tails the KL penalty does not help: the reward rises and the utility does not.

Kwa et al. 2024 (https://arxiv.org/abs/2407.14503): a proxy U + X, whose error X is independent of the true utility U.
If X is light-tailed, the policy that maximises E[U + X] − β·KL gains utility as β falls; if it is heavy-tailed there
are policies of any reward at any small KL that gain none. Here X is drawn for each answer of a pool of SFT's own
answers, from a normal distribution or from Student's t with few degrees of freedom, at the same interquartile range;
the optimal policy is the pool weighted by exp(r/β), and the best of n is told from the same pool.
    python experiments/ablations/tails.py
Nothing but SFT is trained: expect about 8 minutes on 2 CPU cores for 5 seeds.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from scipy import stats

from experiments.ablations.claims import Claim, minus, of, times
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, curve_line, variants_table
from experiments.ablations.worlds import sft_pool, world_with_sft
from experiments.sft import SFT
from rlhf_jax.cli import run_main
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.evaluate import best_of_n_kl, best_of_n_mean
from rlhf_jax.frontier import optimum
from rlhf_jax.log import Run

BUDGETS = (0.25, 0.5, 1.0, 2.0, 3.0)
"""Nats."""
COLUMNS = (
    Column("utility of SFT", "start"), *(Column(f"at {nats:g} nats", f"utility_{nats:g}") for nats in BUDGETS),
    Column("proxy at 3 nats", "proxy_3"), Column("best of 256", "best"),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """Errors of a reward with light and heavy tails, several seeds."""

    errors: tuple[str, ...] = ("normal", "t4", "t2", "t1")
    """normal, or tN: Student's t with N degrees of freedom."""
    scale: float = 1.0
    """The interquartile range of the error, in that of a normal distribution of this standard deviation."""
    n: int = 256
    """Answers to each prompt."""
    prompts: int = 256
    sft: SFT = field(default_factory=SFT)

    def __post_init__(self) -> None:
        """Raises UserError for an error that is none, and for fewer answers than the budgets need."""
        at_least(self, n=64, prompts=1)  # KL from a pool of n is at most log n
        for error in self.errors:
            if not re.fullmatch(r"normal|t\d+(\.\d+)?", error):
                raise UserError(f"--errors: {error!r} is neither normal nor tN, as in t2")
        super().__post_init__()


class Variant(NamedTuple):
    """The error's distribution."""

    error: str


def prepare(cfg: Config, seed: int, run: Run) -> np.ndarray:
    """True utility of a pool of SFT's answers: [prompts, n]."""
    task, sampler = world_with_sft(cfg, seed, run)
    heldout, answers = sft_pool(cfg, task, sampler, seed, cfg.n, cfg.prompts)
    repeated = take(heldout, np.arange(len(heldout.row)).repeat(cfg.n))
    return task.judge(repeated, answers).reshape(-1, cfg.n)


def one(cfg: Config, utility: np.ndarray, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """The best policies for utility plus error: true utility at several distances."""
    rng = np.random.default_rng([seed, 12])
    error = stats.norm if variant.error == "normal" else stats.t(float(variant.error.removeprefix("t")))
    width = stats.norm.ppf(0.75) * cfg.scale / error.ppf(0.75)
    proxy = utility + width * error.rvs(size=utility.shape, random_state=rng)
    found: dict[str, Any] = {"start": utility.mean(), "nats": BUDGETS}
    for nats in BUDGETS:
        beta = beta_for(proxy, nats)
        best = optimum(proxy, beta, utility)
        found |= {f"utility_{nats:g}": best.value, f"proxy_{nats:g}": best.score}
    found["curve"] = [found[f"utility_{nats:g}"] for nats in BUDGETS]
    return found | {"best": best_of_n_mean(proxy, cfg.n, utility).mean(), "bound": best_of_n_kl(cfg.n)}


def beta_for(scores: np.ndarray, nats: float) -> float:
    """The β at which the optimal policy is so far away, by bisection."""
    low, high = 1e-4, 1e4
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if optimum(scores, middle).kl > nats else (low, middle)
    return high


def gained(error: str, what: str = "utility_3") -> Any:
    """The gain over SFT."""
    return minus(of(what, error=error), of("start", error=error))


CLAIMS = (
    Claim("a light-tailed error leaves utility to be gained", "Kwa et al. 2024",
          "utility rises as the KL penalty falls",
          gained("normal"), "true utility at 3 nats", above=0.2),
    Claim("a heavy-tailed error leaves next to none", "Kwa et al. 2024", "it stays",
          minus(gained("t1"), times(0.2, gained("normal"))), "true utility above a fifth of that, Student's t of one"
          " degree", below=0.0),
    Claim("though the proxy rises by more", "Kwa et al. 2024", "any reward at any KL",
          minus(gained("t1", "proxy_3"), gained("normal", "proxy_3")), "of proxy", above=0.0, digits=1),
    Claim("the best of n goes the same way", "Kwa et al. 2024, theorems 5 and 6, fig. B.3",
          "conditioning and best of n as RL",
          minus(gained("t1", "best"), times(0.2, gained("normal", "best"))), "true utility above a fifth of the gain"
          " under a normal error, best of 256", below=0.0),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a distribution; true utility against the distance."""
    lines = [curve_line(cells, variant, "nats", "curve", variant.error) for variant in cells.finished()]
    panel = Panel("The best policy for utility + error", "KL, nats", "true utility", lines)
    return Page([variants_table(cells, ["error"], COLUMNS)], [panel])


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each distribution's means over seeds."""
    variants = [Variant(error) for error in cfg.errors]
    return run_grid(cfg, "tails", variants, one, present, prepare=prepare, axes=("errors",))


if __name__ == "__main__":
    run_main(main, Config)
