"""Constitutional AI in the controlled world: how many revisions help, and how far a judge's bias reaches the policy.

Each seed has a world and an SFT policy of its own. Revisions: its answers are revised four times; SFT learns the
answers themselves (0), or the first, second, third or fourth revision. Bias: from the policy of the second revision
two answers to each prompt go to judges who like flattery more and more, which the true utility does not, and DPO
learns their labels (`experiments/constitutional.py`), which say how sure the judge is. Without a bias DPO also learns
the likelier answer as if it were sure (hard), one that is drawn by the judge's own doubt (drawn), and doubt that is
held between 40 and 60% (clamped).
    python experiments/ablations/constitution.py
It takes about 45 minutes on 2 CPU cores for 5 seeds. It writes a table, and a figure of revisions and bias.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from experiments import constitutional
from experiments.ablations.claims import Claim, minus, of
from experiments.ablations.grid import GridFlags, only_words, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, points_line, variants_table
from experiments.ablations.worlds import world_with_sft
from experiments.dpo import DPO
from experiments.sft import SFT
from rlhf_jax.cli import run_main
from rlhf_jax.log import Run
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.row_file import read_rows
from rlhf_jax.simulation import Annotators, Revisers
from rlhf_jax.simulation.world import FILLERS, FLATTERY
from rlhf_jax.tasks.measure import PolicySampler, make_policy_measure
from rlhf_jax.tasks.simulated import World
from rlhf_jax.types import Params

MOST, SECOND = 4, 2
"""Revisions of each answer, and the one that the policy whose answers are judged has learned."""
CLAMP = 0.6
"""Bai et al.'s 40 to 60%."""
COLUMNS = (
    Column("true utility", "utility"), Column("flattering words an answer", "flattery", 3),
    Column("empty words an answer", "fillers", 3), Column("right, share", "right", 3),
    Column("length", "length", 1), Column("KL to SFT, nats", "kl"), Column("judge agrees with the truth", "judge", 3),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """Numbers of revisions, and biases of a judge, several seeds."""

    revisions: tuple[int, ...] = (0, 1, 2, 3, 4)
    biases: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    """The worth of a flattering word to the judge; its true worth is −0.3."""
    labels: tuple[Literal["hard", "drawn", "clamped"], ...] = ("hard", "drawn", "clamped")
    """Other forms of the labels of the judge without a bias."""
    sft: SFT = field(default_factory=SFT)


class Variant(NamedTuple):
    """A number of revisions; or the bias of the judge after the second; or a form of its labels without one."""

    stage: Literal["revisions", "bias", "hard", "drawn", "clamped"]
    dose: float


class Begun(NamedTuple):
    """A seed's world, its chains of revisions, and the policy that has learned the second ones."""

    task: World
    sampler: PolicySampler
    chains: Path
    revised: Pretrained


def flags_of(cfg: Config, seed: int) -> constitutional.Config:
    """The flags of a seed's runs."""
    short: Any = {"sft": SFT(steps=50), "dpo": DPO(steps=10)} if cfg.quick else {}
    return constitutional.Config(seed=seed, revisions=MOST, **short)


def learn(cfg: Config, seed: int, task: World, run: Run, chains: Path, revision: int) -> Params:
    """SFT on one revision of all answers."""
    flags = flags_of(cfg, seed)
    constitutional.write_revisions(run, chains, revision)
    return constitutional.learn_revisions(flags, task, constitutional.own_data(flags, task, run), run)


def prepare(cfg: Config, seed: int, run: Run) -> Begun:
    """A world, SFT, four revisions of its answers, and SFT on the second ones."""
    task, sampler = world_with_sft(cfg, seed, run)
    assistant = constitutional.world_assistant(task, Annotators(noise=constitutional.NOISE), Revisers())
    constitutional.revise_prompts(flags_of(cfg, seed), task, run, sampler, assistant, seed)
    chains = run.dir / "chains.jsonl"
    revised = task.base._replace(params=learn(cfg, seed, task, run, chains, SECOND))
    return Begun(task, sampler, chains, revised)


def one(cfg: Config, begun: Begun, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """A policy after so many revisions, or after DPO on the labels of a judge with that bias."""
    task, sampler = begun.task, begun.sampler
    if variant.stage == "revisions":
        found = measured(begun, learn(cfg, seed, task, run, begun.chains, int(variant.dose)))
        return found | {"dose": variant.dose}
    flags = flags_of(cfg, seed)
    if variant.stage == "clamped":
        flags = replace(flags, comparisons_clamp=CLAMP)
    people = Annotators(noise=constitutional.NOISE, length_bias=0.0, flattery_bias=variant.dose)
    assistant = constitutional.world_assistant(task, people, Revisers())
    constitutional.compare_answers(task, run, sampler, begun.revised.params, assistant, seed)
    if variant.stage in ("hard", "drawn"):
        harden(run.dir / "comparisons.jsonl", np.random.default_rng(seed) if variant.stage == "drawn" else None)
    data = constitutional.own_data(flags, task, run)
    trained = constitutional.learn_preferences(flags, task, data, run, sampler, begun.revised)
    rows = list(read_rows(run.dir / "comparisons.jsonl"))
    better, worse = (
        task.utilities([row["prompt"] for row in rows], [row[side] for row in rows]) for side in ("chosen", "rejected")
    )
    found = measured(begun, trained.params)
    return found | {"dose": variant.dose, "judge": np.mean(better > worse) + 0.5 * np.mean(better == worse)}


def harden(file: Path, rng: np.random.Generator | None) -> None:
    """Takes the judge's doubt off the rows of comparisons; with `rng` it first decides which answer is the chosen one.

    Rows without a doubt are left as they are.
    """
    rows = list(read_rows(file))
    for row in rows:  # each with a draw of its own, whether it has a doubt or not
        if rng is not None and rng.random() > row.get("probability", 1.0):
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        row.pop("probability", None)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def measured(begun: Begun, policy: Params) -> dict[str, Any]:
    """Means over a policy's answers to held-out prompts."""
    task, sampler = begun.task, begun.sampler
    heldout = task.prompts().heldout
    answers = sampler(policy, heldout, 400)
    words = [text.split() for text in task.base.read_answers(answers)]
    found = make_policy_measure(task, sampler, task.eval_batch_size)(policy, task.base.params, 300)
    prompts = [task.prompts().rows[row].prompt for row in heldout.row.tolist()]
    right = task.checker().on_texts
    assert right is not None
    return {
        "utility": found["utility"], "length": found["length"], "kl": found["kl_k1"],
        "flattery": np.mean([sum(word in FLATTERY for word in some) for some in words]),
        "fillers": np.mean([sum(word in FILLERS for word in some) for some in words]),
        "right": right(prompts, [" ".join(some) for some in words], {}).scores.mean(),
    }  # fmt: skip


CLAIMS = (
    Claim("each revision is better", "Bai et al. 2022, fig. 5", "harmlessness rises with every revision",
          minus(of("utility", stage="revisions", dose=2), of("utility", stage="revisions", dose=0)),
          "of true utility by two", above=0.0),
    Claim("the second helps less than the first", "Bai et al. 2022, §3.1", "most comes of the first",
          minus(minus(of("utility", stage="revisions", dose=2), of("utility", stage="revisions", dose=1)),
                minus(of("utility", stage="revisions", dose=1), of("utility", stage="revisions", dose=0))),
          "of true utility", below=0.0),
    Claim("a judge's bias reaches the policy", "Perez et al. 2022; Sharma et al. 2023", "sycophancy is rewarded",
          minus(of("flattery", stage="bias", dose=1), of("flattery", stage="bias", dose=0)),
          "flattering words an answer", above=0.1),
    Claim("while it still agrees with the truth", "Sharma et al. 2023",
          "sycophancy wins over the truth a part of the time",
          of("judge", stage="bias", dose=1), "of pairs", above=0.85, digits=3),
    Claim("soft labels are better than hard ones", "Bai et al. 2022, §4.3", "much better results",
          minus(of("utility", stage="bias", dose=0), of("utility", stage="hard")), "of true utility", above=0.0),
    Claim("and than labels drawn by the same doubt", "Lee et al. 2023 (RLAIF), §2.1",
          "a distribution tells more than one"
          " label", minus(
          of("utility", stage="bias", dose=0), of("utility", stage="drawn")), "of true utility", above=0.0),
    Claim("doubt clamped to 40 to 60% is as good", "Bai et al. 2022, §4.3", "better, where labels are too sure",
          minus(of("utility", stage="clamped"), of("utility", stage="bias", dose=0)), "of true utility",
          above=-0.05),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a dose; true utility against revisions, flattery against the judge's bias."""
    found = cells.finished()
    revisions, biases = ([one for one in found if one.stage == stage] for stage in ("revisions", "bias"))
    draw = partial(points_line, cells)
    panels = [
        Panel("Revisions", "revision that SFT learns", "true utility", [draw(revisions, "dose", "utility", "utility")])
        if revisions else None,
        Panel("A judge's bias", "worth of a flattering word to the judge", "a policy's answers", [
            draw(biases, "dose", "flattery", "flattering words"), draw(biases, "dose", "utility", "true utility"),
        ]) if biases else None,
    ]  # fmt: skip
    return Page([variants_table(cells, ["stage", "dose"], COLUMNS)], [panel for panel in panels if panel])


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each dose's means over seeds."""
    only_words(cfg)
    variants = [Variant("revisions", float(number)) for number in cfg.revisions]
    variants += [Variant("bias", bias) for bias in cfg.biases] + [Variant(form, 0.0) for form in cfg.labels]
    axes = ("revisions", "biases", "labels")
    return run_grid(cfg, "constitution", variants, one, present, prepare=prepare, axes=axes)


if __name__ == "__main__":
    run_main(main, Config)
