"""The effect of β in DPO, IPO, SimPO, ORPO and KTO: true utility against the distance from SFT.

Rafailov et al. 2024 (https://arxiv.org/abs/2406.02900) find that DPO, IPO and SLiC are over-optimised as reward models
are: a smaller β moves the policy further from the reference, and beyond some distance it gets worse. Here the true
utility is known. Each seed has a world, an SFT policy and comparisons of its own. Each loss, β and learning rate is a
run.
    python experiments/ablations/preference_losses.py
    python experiments/ablations/preference_losses.py --losses dpo ipo simpo orpo kto --betas
Without a number after --betas each loss has its default β. DPO at five β takes about 50 minutes on 2 CPU cores for 5
seeds.
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments import dpo, ipo, kto, orpo, simpo
from experiments.ablations.claims import Claim, Numbers, minus, of
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, points_line, variants_table
from experiments.ablations.worlds import AfterSFT, after_sft
from experiments.sft import SFT
from experiments.stages import preference_defaults, train_preference
from experiments.training import Preference
from rlhf_jax.cli import run_main
from rlhf_jax.data.pairs import paired, singly
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.tasks.measure import compare_policies, make_policy_measure, make_token_scorer

METHODS: dict[str, tuple[Any, Any]] = {
    "dpo": (dpo, dpo.DPO), "ipo": (ipo, ipo.IPO), "simpo": (simpo, simpo.SimPO), "orpo": (orpo, orpo.ORPO),
    "kto": (kto, kto.KTO),
}  # fmt: skip
"""The files, each with its loss and its implicit reward, and their flags."""
COLUMNS = tuple(
    Column(head, name, digits, extremes=True)
    for head, name, digits in (
        ("KL to SFT, nats", "kl_k1", 1), ("true utility", "policy_utility", 2), ("its peak", "peak_utility", 2),
        ("beats SFT", "win_rate", 3), ("on shifted prompts", "shifted_win_rate", 3),
        ("held-out accuracy", "val_accuracy", 3), ("log π chosen", "val_chosen_change", 1),
        ("log π rejected", "val_rejected_change", 1), ("length", "policy_length", 1), ("ended", "ended", 3),
        ("copies", "duplicates", 3),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """Preference losses at several β and learning rates, several seeds."""

    losses: tuple[Literal["dpo", "ipo", "simpo", "orpo", "kto"], ...] = ("dpo",)
    betas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    learning_rates: tuple[float, ...] = (5e-4,)
    sft: SFT = field(default_factory=SFT)
    preference: Preference = field(default_factory=Preference)
    """The flags that all losses share. β and the learning rate are set by the flags above."""

    def __post_init__(self) -> None:
        """Raises UserError for a variant that cannot be run, and for a learning rate in --preference."""
        super().__post_init__()
        if self.preference.learning_rate is not None:
            raise UserError("--preference.learning-rate is not used here: give --learning-rates")
        for variant in variants(self):
            flags_of(self, variant)


class Variant(NamedTuple):
    """A loss and its numbers."""

    loss: str
    beta: float
    learning_rate: float


def variants(cfg: Config) -> list[Variant]:
    """Every loss with every β, or its own, and every learning rate."""
    return [
        Variant(loss, beta, rate)
        for loss in cfg.losses
        for beta in cfg.betas or (METHODS[loss][1]().beta,)
        for rate in cfg.learning_rates
    ]


def flags_of(cfg: Config, variant: Variant) -> Any:
    """The flags of a variant's own file. Raises UserError for what it cannot be run with."""
    numbers = {"beta": variant.beta, "learning_rate": variant.learning_rate}
    return METHODS[variant.loss][1](**asdict(cfg.preference) | numbers)


def one(cfg: Config, begun: AfterSFT, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """One loss at one β and learning rate: where it ends beside SFT, and the best of its evaluations."""
    module, own = METHODS[variant.loss][0], flags_of(cfg, variant)
    task, size, single = begun.task, begun.task.eval_batch_size, variant.loss == "kto"
    examples = paired(begun.comparisons.train, own.pairs)
    trained = train_preference(
        own, partial(module.loss, own), partial(module.reward, own), begun.base,
        singly(examples) if single else examples, begun.comparisons, run, seed, stage=variant.loss,
        eval_batch_size=size, mismatched=single, measure=make_policy_measure(task, begun.sampler, size),
    )  # fmt: skip
    logged = [(row["utility"], row["step"]) for row in read_metrics(run.dir)[variant.loss] if "utility" in row]
    peak, step = max(logged)
    policies = ("sft", begun.base.params), ("policy", trained.params)
    ends = compare_policies(run, task, *policies, begun.sampler, make_token_scorer(task, trained.reward))
    filled = preference_defaults(own, begun.base, len(examples.groups), variant.learning_rate)
    epoch = step * filled.batch_size / len(examples.groups)
    return trained.metrics | ends | {"peak_utility": peak, "peak_epoch": epoch}


def ends_above(beta: float, other: float) -> Numbers:
    """True utility of DPO at one β above that at another."""
    return minus(of("policy_utility", loss="dpo", beta=beta), of("policy_utility", loss="dpo", beta=other))


CLAIMS = (
    Claim("DPO with a small β is over-optimised", "Rafailov et al. 2024, fig. 1", "the win rate peaks and falls",
          ends_above(0.01, 0.1), "of true utility, β = 0.01 above 0.1", below=0.0),
    Claim("it is at its best before the first epoch ends", "Rafailov et al. 2024, fig. 2",
          "after a quarter of it, far off",
          of("peak_epoch", loss="dpo", beta=0.01), "epochs of 1.07, β = 0.01", below=0.5),
    Claim("with a large β it stays behind, too", "Rafailov et al. 2024, fig. 1", "it stays near the reference",
          ends_above(1.0, 0.1), "of true utility, β = 1 above 0.1", below=0.0),
    Claim("the policy leaves the reference further", "Rafailov et al. 2023", "β holds it there",
          minus(of("kl_k1", loss="dpo", beta=0.01), of("kl_k1", loss="dpo", beta=0.3)), "nats", above=2.0, digits=1),
    Claim("DPO lowers the chosen answers' likelihood, too", "Razin et al. 2024; Rafailov et al. 2024", "both fall",
          of("val_chosen_change", loss="dpo", beta=0.1), "nats a chosen answer", below=0.0, digits=1),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a variant; true utility against the KL to SFT, a line a loss and learning rate."""
    groups: dict[str, list[Variant]] = {}
    for variant in cells.finished():
        groups.setdefault(f"{variant.loss}, learning rate {variant.learning_rate:g}", []).append(variant)
    lines = [points_line(cells, sorted(some), "kl_k1", "policy_utility", name) for name, some in groups.items()]
    panel = Panel("Several β", "KL(π‖SFT), nats a response", "true utility", lines)
    return Page([variants_table(cells, ["loss", "β", "learning rate"], COLUMNS)], [panel])


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each variant's means over seeds."""
    axes = ("losses", "betas", "learning_rates")
    return run_grid(cfg, "preference_losses", variants(cfg), one, present, prepare=after_sft, axes=axes)


if __name__ == "__main__":
    run_main(main, Config)
