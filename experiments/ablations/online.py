"""DPO on SFT's answers and on those of the policy as it learns: the better classifier and the better generator.

Tang et al. 2024 (https://arxiv.org/abs/2405.08448): at equal KL to SFT the same loss wins more on fresh answers of its
own policy (online) than on given ones (offline); the offline policy is the better classifier of given pairs and the
worse generator; and the online run's own data, shuffled and learned offline, do not reach the online run. Here every
plan has as many rounds, prompts, answers, labels by the same annotators, and steps of DPO, and starts each round from
the last policy, with SFT as the reference. They differ in who answers a round's prompts: SFT (offline) or the last
policy (online). Shuffled has the labels of the online run in another order, answers of all its policies in each round.
    python experiments/ablations/online.py
Expect about 25 minutes on 2 CPU cores for 5 seeds.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from jaxtyping import Float

from experiments import dpo, iterate
from experiments.ablations.claims import Claim, Numbers, minus, of, variant_of
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, curve_line, variants_table
from experiments.ablations.worlds import AfterSFT, after_sft
from experiments.dpo import DPO
from experiments.sft import SFT
from experiments.stages import open_own, train_preference
from rlhf_jax.cli import run_main
from rlhf_jax.data.pairs import paired
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.log import Run
from rlhf_jax.row_file import read_rows
from rlhf_jax.tasks.measure import make_policy_measure
from rlhf_jax.types import Params

Plan = Literal["offline", "online", "shuffled"]
BUDGETS = (1.0, 2.0, 4.0)
"""Nats."""
COLUMNS = (
    Column("KL to SFT, nats", "end_kl", 1), Column("true utility", "end"), Column("its peak", "peak"),
    *(Column(f"at {nats:g} nats", f"utility_{nats:g}") for nats in BUDGETS),
    Column("accuracy on pairs of SFT's answers", "accuracy", 3), Column("its peak", "peak_accuracy", 3),
    Column("labelled prompts", "labels", 0),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """DPO in rounds on answers of three kinds, several seeds."""

    plans: tuple[Plan, ...] = ("offline", "online", "shuffled")
    rounds: int = 16
    """The world's prompts are divided among them."""
    answers: int = 8
    """Answers to each prompt, which are ranked together; DPO learns the best against the worst."""
    sft: SFT = field(default_factory=SFT)
    preference: DPO = field(default_factory=lambda: DPO(steps=16, warmup=0.1, evaluations=1))
    """A round of DPO: two passes over its labels. The learning rate ends at zero, where the policy is measured."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range, and for labels that are shuffled before there are any."""
        at_least(self, rounds=2, answers=2)
        if "shuffled" in self.plans and "online" not in self.plans[: self.plans.index("shuffled")]:
            raise UserError("--plans: shuffled has the labels of online, which is to come before it")
        super().__post_init__()

    def hurried(self) -> Any:
        """The flags of a quick run: few rounds."""
        return replace(super().hurried(), rounds=4)


class Variant(NamedTuple):
    """The answers that are labelled."""

    plan: Plan


def one(cfg: Config, begun: AfterSFT, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """DPO in rounds: KL to SFT, true utility and accuracy of the implicit reward after each of them, and before."""
    task, sampler, sft = begun.task, begun.sampler, begun.base.params
    measure = make_policy_measure(task, sampler, task.eval_batch_size)
    if variant.plan == "shuffled":
        deal_again(run.dir.parent / "online", run.dir, cfg.rounds, seed)
    seen = [measure(sft, sft, 300)]
    for policy, found in learn(cfg, begun, seed, variant.plan, run):
        seen.append(found | measure(policy, sft, 300 + len(seen)))
    kl, utility = (np.array([row[name] for row in seen]) for name in ("kl_k1", "utility"))
    accuracy = np.array([row["val_accuracy"] for row in seen[1:]])
    reached = {f"utility_{nats:g}": at_distance(kl, utility, nats) for nats in BUDGETS if kl.max() >= nats}
    return begun.comparisons.facts | reached | {
        "nats": kl, "utility": utility, "end_kl": kl[-1], "end": utility[-1], "peak": utility.max(),
        "accuracies": accuracy, "accuracy": accuracy[-1], "peak_accuracy": accuracy.max(),
        "labels": sum(row["labels"] for row in seen[1:]),
    }  # fmt: skip


def learn(cfg: Config, begun: AfterSFT, seed: int, plan: Plan, run: Run) -> Iterator[tuple[Params, dict[str, float]]]:
    """The policy after each round, and how well its implicit reward predicts held-out pairs of SFT's answers."""
    task, sampler, base = begun.task, begun.sampler, begun.base
    flags = iterate.Config(seed=seed, labels=len(task.prompts().train.row) // cfg.rounds, answers=cfg.answers)
    label, policy, own = iterate.world_labels(task, partial(sampler, base.params)), base.params, cfg.preference
    for number in range(1, cfg.rounds + 1):
        answering = base.params if plan == "offline" else policy
        asked = partial(iterate.answer_prompts, flags, task, run, sampler, answering, [], number, seed)
        iterate.label_round(run, asked, label, number)  # where there are labels already, as of shuffled, it has those
        files = {"comparisons": [run.dir / f"round-{number}" / "comparisons.jsonl"]}
        labels = open_own(flags, task, run, files).comparisons(partial(sampler, base.params)).train
        trained = train_preference(
            own, partial(dpo.loss, own), partial(dpo.reward, own), base._replace(params=policy),
            paired(labels, own.pairs), begun.comparisons, run, seed + number, stage=f"dpo-{number}",
            eval_batch_size=task.eval_batch_size, reference=base.params,
        )  # fmt: skip
        policy = trained.params
        yield policy, trained.metrics | {"labels": len(labels)}


def deal_again(source: Path, folder: Path, rounds: int, seed: int) -> None:
    """Writes the labels of another run's rounds to rounds of this one, each a random part of all.

    Raises UserError where the other run has not all of its rounds.
    """
    files = [source / f"round-{number}" / "comparisons.jsonl" for number in range(1, rounds + 1)]
    if not all(file.exists() for file in files):
        raise UserError(f"{source} has no labels of {rounds} rounds")
    rows = [row for file in files for row in read_rows(file)]
    order = np.random.default_rng([seed, 14]).permutation(len(rows))
    for number, part in enumerate(np.array_split(order, rounds), 1):
        iterate.write_lines(folder / f"round-{number}" / "comparisons.jsonl", [rows[place] for place in part])


def at_distance(kl: Float[np.ndarray, " N"], utility: Float[np.ndarray, " N"], nats: float) -> float:
    """True utility where a policy on its way first is so many nats away, on the line between two measurements.

    Raises ValueError where it does not get there.
    """
    if not kl.max() >= nats:
        raise ValueError(f"the policy is never {nats} nats away")
    after = int(np.argmax(kl >= nats))
    around = slice(max(0, after - 1), after + 1)
    return float(np.interp(nats, kl[around], utility[around]))


def ahead(first: dict[str, Any], other: dict[str, Any]) -> Numbers:
    """True utility of the variant with some fields above another's, at the largest KL that both reach.

    Their cells have the curves nats and utility. Raises KeyError where there is no such variant.
    """

    def numbers(cells: Cells) -> dict[int, float]:
        found = {}
        variants = [variant_of(cells, **fields) for fields in (first, other)]
        kls, utilities = ([cells.by_seed(one, name) for one in variants] for name in ("nats", "utility"))
        for seed in kls[0].keys() & kls[1].keys():
            nats = min(kl[seed].max() for kl in kls)
            one, two = (at_distance(kl[seed], y[seed], nats) for kl, y in zip(kls, utilities, strict=True))
            found[seed] = one - two
        return found

    return numbers


OFFLINE, ONLINE, SHUFFLED = {"plan": "offline"}, {"plan": "online"}, {"plan": "shuffled"}
CURVES = ("nats", "utility")
"""Curves of the cells that claims are decided by."""
CLAIMS = (
    Claim("at equal KL online is better than offline", "Tang et al. 2024, fig. 1", "generally, at a fixed KL",
          ahead(ONLINE, OFFLINE), "true utility at the largest KL that both reach", above=0.0),
    Claim("at its best it is, too: offline is the worse generator", "Tang et al. 2024, fig. 1", "a higher peak",
          minus(of("peak", **ONLINE), of("peak", **OFFLINE)), "true utility, peak above peak", above=0.0),
    Claim("offline is the better classifier of SFT's answers", "Tang et al. 2024, abstract", "good at classification,"
          " worse at generation", minus(of("accuracy", **OFFLINE), of("accuracy", **ONLINE)),
          "of held-out pairs, at the end", above=0.0, digits=3),
    Claim("the online run's data, learned offline, do not reach it", "Tang et al. 2024, abstract", "coverage of data"
          " does not explain it", ahead(SHUFFLED, ONLINE), "true utility at the largest KL that both reach",
          below=0.0),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a plan; true utility against KL, and accuracy by round."""
    found = cells.finished()
    panels = [
        Panel("Generation", "KL to SFT, nats", "true utility",
              [curve_line(cells, variant, "nats", "utility", variant.plan) for variant in found]),
        Panel("Classification", "round", "accuracy on held-out pairs of SFT's answers",
              [curve_line(cells, variant, None, "accuracies", variant.plan) for variant in found]),
    ]  # fmt: skip
    return Page([variants_table(cells, ["answers"], COLUMNS)], panels)


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each plan's means over seeds."""
    variants = [Variant(plan) for plan in cfg.plans]
    return run_grid(cfg, "online", variants, one, present, prepare=after_sft, axes=("plans",))


if __name__ == "__main__":
    run_main(main, Config)
