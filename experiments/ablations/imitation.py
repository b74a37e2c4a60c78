"""SFT caps at its demonstrators, loses where the prompt is learned, and few careful ones against many careless ones.

Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155) learn answers only, find that SFT overfits by validation loss
after an epoch while people's preference goes on rising (§3.5), and that SFT stays behind what preferences reach. Zhou
et al. 2023 (LIMA, https://arxiv.org/abs/2305.11206) find that a thousand careful demonstrations beat many careless
ones. "Careless" demonstrators are the world's; "careful" ones make half as many mistakes and digressions.
    python experiments/ablations/imitation.py
Each seed has a world of its own. Expect about 25 minutes on 2 CPU cores for 5 seeds.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from experiments import sft
from experiments.ablations.claims import Claim, minus, of
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, points_line, variants_table
from experiments.ablations.worlds import open_world
from experiments.sft import SFT
from rlhf_jax.batches import Tokens
from rlhf_jax.cli import run_main
from rlhf_jax.data.epochs import EpochBatches
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.simulation import Demonstrators
from rlhf_jax.tasks.measure import make_utility_measure
from rlhf_jax.tasks.simulated import SIZES

CAREFUL = Demonstrators(error=0.12, filler=0.19, flattery=0.04)
COLUMNS = (
    Column("demonstrators", "demonstrators_utility"), Column("SFT, true utility", "utility"),
    Column("validation loss", "val_loss", 3), Column("epochs", "epochs", 1),
    Column("epoch of the least loss", "loss_epoch", 1), Column("epoch of the highest utility", "utility_epoch", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """SFT on more and fewer demonstrations, of more and less careful people, with and without the prompt."""

    counts: tuple[int, ...] = (250, 1000, 4000, 32_000)
    """Demonstrations; the world has 32,000."""
    sft: SFT = field(default_factory=lambda: SFT(steps=1500))

    def __post_init__(self) -> None:
        """Raises UserError for more demonstrations than there are."""
        super().__post_init__()
        if not self.counts or min(self.counts) < 1 or max(self.counts) > SIZES.demonstrations:
            raise UserError(f"--counts are from 1 to {SIZES.demonstrations}, the demonstrations of the world")


class Variant(NamedTuple):
    """The people, how many of their demonstrations, and what is learned of each."""

    people: Literal["careless", "careful"]
    number: int
    learned: Literal["answer", "all"]


def variants(cfg: Config) -> list[Variant]:
    """All people with all counts, and the prompt learned, too, for the most."""
    people: tuple[Literal["careless", "careful"], ...] = ("careless", "careful")
    return [Variant(some, count, "answer") for some in people for count in cfg.counts] + [
        Variant("careless", max(cfg.counts), "all")
    ]


def with_prompts(tokens: Tokens) -> Tokens:
    """The same rows with every token of a document learned but its first."""
    after = np.pad(tokens.segment_ids[:, 1:], ((0, 0), (0, 1)))
    return tokens._replace(mask=(tokens.segment_ids > 0) & (after == tokens.segment_ids))


def one(cfg: Config, prepared: None, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """SFT: its true utility, and when loss and utility were at their best."""
    people = CAREFUL if variant.people == "careful" else Demonstrators()
    task, sampler = open_world(cfg, seed, demonstrators=people)
    found = task.demonstrations()
    rows = max(1, round(found.train.mask.shape[0] * min(1.0, variant.number / task.sizes.demonstrations)))
    train = take(found.train, slice(rows))
    train = with_prompts(train) if variant.learned == "all" else train
    data = found._replace(train=train, batches=lambda size, seed: EpochBatches(train, size, seed), rows=rows)
    measure = make_utility_measure(task, sampler)
    size, stage = task.eval_batch_size, "imitation"
    trained = sft.train(cfg.sft, task.base, data, run, seed, eval_batch_size=size, measure=measure, stage=stage)
    logged = [row for row in read_metrics(run.dir)[stage] if "utility" in row]
    an_epoch = max(1, rows // min(rows, cfg.sft.batch_size))
    losses, utilities = (np.array([row[name] for row in logged]) for name in ("val_loss", "utility"))
    steps = np.array([row["step"] for row in logged]) / an_epoch
    return task.facts | {
        "utility": measure(trained.params, 100)["utility"], "val_loss": losses[-1], "epochs": steps[-1],
        "number": variant.number, "loss_epoch": steps[losses.argmin()], "utility_epoch": steps[utilities.argmax()],
        "utility_after_least_loss": utilities[losses.argmin() :].mean() - utilities[losses.argmin()],
        "loss_after_its_least": losses[-1] - losses.min(),
    }  # fmt: skip


BEST = of("utility", people="careless", number=32_000, learned="answer")
CLAIMS = (
    Claim("SFT does not pass its demonstrators", "Stiennon et al. 2020, fig. 1", "supervised summaries win 43% against"
          " the references",
          minus(BEST, of("demonstrators_utility", people="careless", number=32_000)), "true utility above theirs",
          below=0.0),
    Claim("learning the prompt, too, costs something", "Shi et al. 2024", "learning it, too, helps most where"
          " answers are short or examples few", minus(of("utility", learned="all"), BEST),
          "true utility", below=0.0),
    Claim("1,000 careful demonstrations beat 32,000 careless ones", "Zhou et al. 2023 (LIMA)",
          "1,000 careful ones beat 52,000",
          minus(of("utility", people="careful", number=1000), BEST), "true utility", above=0.0),
    Claim("of as many, careful ones are better", "Zhou et al. 2023 (LIMA)", "quality before quantity",
          minus(of("utility", people="careful", number=32_000), BEST), "true utility", above=0.0),
    Claim("with few demonstrations validation loss turns up", "Ouyang et al. 2022, §3.5", "after one epoch of 16",
          of("loss_after_its_least", people="careless", number=1000), "nats a token", above=0.05, digits=3),
    Claim("the policy goes on getting better after that", "Ouyang et al. 2022, §3.5",
          "reward model's score and preference go on rising",
          of("utility_after_least_loss", people="careless", number=1000), "true utility", above=0.02),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a variant; true utility against the number of demonstrations."""
    found = [variant for variant in cells.finished() if variant.learned == "answer"]
    lines = [points_line(cells, [one for one in found if one.people == people], "number", "utility", people)
             for people in ("careless", "careful") if any(one.people == people for one in found)]  # fmt: skip
    lines = [line._replace(x=np.log10(line.x)) for line in lines]
    panel = Panel("Quality against volume", "log₁₀ demonstrations", "true utility", lines)
    return Page([variants_table(cells, ["people", "demonstrations", "learned"], COLUMNS)], [panel])


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each variant's means over seeds."""
    return run_grid(cfg, "imitation", variants(cfg), one, present, axes=("counts",))


if __name__ == "__main__":
    run_main(main, Config)
