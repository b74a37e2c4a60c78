"""Models of four sizes: a small aligned one against large raw ones, and reward models that grow.

Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155): people prefer a 1.3B InstructGPT to the raw 175B GPT-3. Here
each size is learned three times. Raw: all of the text of careless people, prompts too, as language modelling. SFT:
answers of careful people, from nothing, for as many steps. Aligned: SFT after PPO against one reward model, as in the
paper the same for all sizes. The raw model is asked as it was taught: it knows where answers begin and end, which
GPT-3 did not.
Gao et al. 2023 (https://arxiv.org/abs/2210.10760): the best of n by a reward model gains R(d) = d(α − βd) at d = √KL;
α and β go with the logarithm of its parameters. Here reward models of each size start from the SFT of their size,
learn the same comparisons of the largest SFT's answers, and pick among the same answers. True utility has a most, so
that the best of n by the truth itself has a β, too.
    python experiments/ablations/sizes.py
Each seed has a world of its own. Expect about 30 minutes on 2 CPU cores for 5 seeds.
"""

import inspect
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from experiments import ppo, reward_model, sft
from experiments.ablations.claims import Claim, Numbers, of
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, curve_line, points_line, variants_table
from experiments.ablations.imitation import CAREFUL, with_prompts
from experiments.ablations.records import code_hash
from experiments.ablations.reward_data import best_of_pool
from experiments.ablations.worlds import AfterSFT, after_sft, kept, open_world
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.sft import SFT
from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.cli import run_main
from rlhf_jax.data.epochs import EpochBatches
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.evaluate import win_rate
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models.weights import count_weights
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.sampling.sampler import make_sampler
from rlhf_jax.tasks.measure import make_reward_scorer
from rlhf_jax.tasks.simulated import World
from rlhf_jax.tasks.task import Demonstrations
from rlhf_jax.types import Params

LARGEST, HEAD = 64, 16
"""The width of the world's own model, and of its attention heads."""
POLICY_COLUMNS = (
    Column("parameters", "parameters", 0), Column("raw, true utility", "raw_utility"), Column("SFT", "sft_utility"),
    Column("aligned", "aligned_utility"), Column("KL, nats", "kl", 1),
    Column("raw beats the largest SFT", "raw_wins", 3), Column("SFT does", "sft_wins", 3),
    Column("aligned does", "aligned_wins", 3), Column("aligned beats the largest raw", "aligned_beats_raw", 3),
)  # fmt: skip
REWARD_COLUMNS = (
    Column("reward model: agreement", "val_accuracy", 3), Column("ceiling", "ceiling", 3),
    Column("above chance, share", "share_above_chance", 3), Column("best of n: most gained", "gain"),
    Column("α", "alpha", 3), Column("β", "beta", 3), Column("R²", "r2"),
    Column("picked by truth: gained", "truth_gain"), Column("α", "truth_alpha", 3), Column("β", "truth_beta", 3),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """Policies and reward models of several sizes, several seeds."""

    widths: tuple[int, ...] = (8, 16, 32, 64)
    """Widths of the models; the last is that of the world's own. All have as many layers."""
    n: int = 128
    """The most answers of which the best is picked."""
    prompts: int = 256
    """Prompts on which it is."""
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=lambda: RewardModel(epochs=1))
    ppo: PPO = field(default_factory=PPO)

    def __post_init__(self) -> None:
        """Raises UserError for widths that do not end at the world's, and for too few answers."""
        at_least(self, n=8, prompts=1)  # of fewer answers there is no curve to fit
        if len(self.widths) < 2 or sorted({*self.widths}) != [*self.widths] or self.widths[-1] != LARGEST:
            raise UserError(f"--widths are at least two, rise, and end at the world's own, which is {LARGEST}")
        if self.widths[0] < 2 or any(width % HEAD for width in self.widths if width > HEAD):
            raise UserError(f"--widths are at least 2, and above {HEAD} multiples of it")
        super().__post_init__()


class Variant(NamedTuple):
    """The width of the models."""

    width: int


class Prepared(NamedTuple):
    """A seed's largest models, careless people's text, and held-out prompts with n answers each."""

    begun: AfterSFT
    text: Demonstrations
    raw: Params
    rewards: Params
    utilities: dict[str, np.ndarray]
    """True utility of the largest raw and SFT models' answers to held-out prompts."""
    heldout: Prompts
    answers: Completions
    facts: dict[str, dict[str, Any]]
    """Facts about the largest reward model, and of the best of n by true utility."""


def of_width(base: Pretrained, width: int) -> Pretrained:
    """A model like another one, still to be initialised, of another width."""
    heads = max(1, width // HEAD)
    config = replace(base.config, d_model=width, d_ff=2 * width, n_heads=heads, n_kv_heads=heads)
    return base._replace(config=config, params=None)


def learned(
    cfg: Config, task: World, base: Pretrained, text: Demonstrations, seed: int, run: Run, stage: str
) -> Params:
    """A new model that has learned a text with `cfg.sft`."""

    def make() -> Params:
        return sft.train(cfg.sft, base, text, run, seed, eval_batch_size=task.eval_batch_size, stage=stage).params

    prompts = code_hash(Path(inspect.getfile(with_prompts)))
    flags = {"sft": cfg.sft, "width": base.config.d_model, "careful": CAREFUL, "prompts": prompts}
    return kept(cfg, task, f"sizes_{stage}", seed, flags, make)


def prepare(cfg: Config, seed: int, run: Run) -> Prepared:
    """The largest models, comparisons of SFT's answers, and the answers that the best is picked of."""
    begun = after_sft(cfg, seed, run, demonstrators=CAREFUL)
    (task, sampler, base, _), sets = begun, begun.task.prompts()
    found = open_world(cfg, seed)[0].demonstrations()  # the world's people, who are less careful
    train = with_prompts(found.train)
    text = found._replace(train=train, batches=lambda size, seed: EpochBatches(train, size, seed))
    raw = learned(cfg, task, of_width(base, LARGEST), text, seed, run, "raw")
    rewards, facts = trained_rewards(cfg, begun, base, seed, run)
    utilities = {
        name: task.judge(sets.heldout, sampler(params, sets.heldout, number))
        for number, (name, params) in enumerate({"raw": raw, "sft": base.params}.items(), 200)
    }
    heldout = take(sets.heldout, slice(cfg.prompts))
    answers = sampler(base.params, take(heldout, np.arange(len(heldout.row)).repeat(cfg.n)), 0)
    best = best_of_pool(task, task.judge, heldout, answers, cfg.n)
    truth = {f"truth_{name}": best[name] for name in ("gain", "alpha", "beta")}
    return Prepared(begun, text, raw, rewards, utilities, heldout, answers, {"rewards": facts, "truth": truth})


def trained_rewards(
    cfg: Config, begun: AfterSFT, start: Pretrained, seed: int, run: Run
) -> tuple[Params, dict[str, Any]]:
    """A reward model of the comparisons, and its agreement."""

    def make() -> tuple[Params, dict[str, float]]:
        return reward_model.train(
            cfg.reward_model, start, begun.comparisons, run, seed, eval_batch_size=begun.task.eval_batch_size,
            zero=begun.task.demonstrations().validation,
        )  # fmt: skip

    flags = {"sft": cfg.sft, "reward_model": cfg.reward_model, "width": start.config.d_model, "careful": CAREFUL}
    params, found = kept(cfg, begun.task, "sizes_rewards", seed, flags, make)
    return params, {name: found[f"reward_model_{name}"] for name in ("val_accuracy", "ceiling", "share_above_chance")}


def one(cfg: Config, prepared: Prepared, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """Raw, SFT and aligned policies of a size beside the largest, and the best of n by a reward model of that size."""
    begun, heldout = prepared.begun, prepared.begun.task.prompts().heldout
    task, base = begun.task, of_width(begun.base, variant.width)
    if variant.width == LARGEST:
        raw, start, rewards, agreed = prepared.raw, begun.base, prepared.rewards, prepared.facts["rewards"]
    else:
        raw = learned(cfg, task, base, prepared.text, seed, run, "raw")
        start = base._replace(params=learned(cfg, task, base, task.demonstrations(), seed, run, "sft"))
        rewards, agreed = trained_rewards(cfg, begun, start, seed, run)
    own = model_reward(start.config, rewards, name="reward_model", weight=1.0)
    score = make_reward_scorer(task, [own], cfg.ppo.no_end_score)
    found = prepared.facts["truth"] | agreed | best_of_pool(task, score, prepared.heldout, prepared.answers, cfg.n)

    largest = model_reward(begun.base.config, prepared.rewards, name="reward_model", weight=1.0)
    aligned, _ = ppo.train(
        cfg.ppo, start, task.prompts(), [largest], run, seed, max_new_tokens=task.max_new_tokens,
        critic=(begun.base.config, prepared.rewards), judge=task.judge,
    )  # fmt: skip
    sampler = make_sampler(
        start.config, seed=seed, max_new_tokens=task.max_new_tokens, temperature=1.0, eos_id=base.eos_id,
        pad_id=base.pad_id, batch_size=task.eval_batch_size,
    )  # fmt: skip
    for number, (name, policy) in enumerate({"raw": raw, "sft": start.params, "aligned": aligned}.items(), 100):
        utility = task.judge(heldout, sampler(policy, heldout, number))
        found |= {f"{name}_utility": utility.mean(), f"{name}_wins": win_rate(utility, prepared.utilities["sft"]).rate}
    count = count_weights(start.params)
    return found | {
        "aligned_beats_raw": win_rate(utility, prepared.utilities["raw"]).rate, "parameters": count,
        "log_parameters": np.log10(count), "kl": np.mean([row["kl_k1"] for row in read_metrics(run.dir)["ppo"]][-5:]),
    }  # fmt: skip


def slope(name: str) -> Numbers:
    """The change of a number for ten times as many parameters: the slope of the straight line through all sizes."""

    def numbers(cells: Cells) -> dict[int, float]:
        found = cells.finished()
        if len(found) < 2:
            raise KeyError(name)
        logs, values = ([cells.by_seed(one, some) for one in found] for some in ("log_parameters", name))
        slopes = {}
        for seed in cells.seeds:
            if all(seed in some for some in values):
                x, y = (np.array([float(each[seed]) for each in some]) for some in (logs, values))
                slopes[seed] = float(np.polyfit(x, y, 1)[0])
        return slopes

    return numbers


CLAIMS = (
    Claim("the smallest aligned model beats the largest raw one", "Ouyang et al. 2022, fig. 1", "1.3B InstructGPT is"
          " preferred to 175B GPT-3", of("aligned_beats_raw", width=8), "of prompts", above=0.5, digits=3),
    Claim("at the same size it does on at least 82%", "Ouyang et al. 2022, §4.1", "175B: 85 ± 3%",
          of("aligned_beats_raw", width=LARGEST), "of prompts", above=0.82, digits=3),
    Claim("the smallest aligned model does not beat the largest SFT", "Ouyang et al. 2022, fig. 1", "1.3B PPO-ptx is"
          " about even with 175B SFT, read off at 0.52 to 0.53", of("aligned_wins", width=8), "of prompts", below=0.5,
          digits=3),
    Claim("aligned models grow better with their size", "Ouyang et al. 2022, fig. 1", "they do from 1.3B to 175B",
          slope("aligned_utility"), "of true utility for ten times the parameters", above=0.0),
    Claim("larger reward models agree more", "Stiennon et al. 2020, §4.3", "twice the parameters: 1.8 points more",
          slope("val_accuracy"), "of agreement for ten times the parameters", above=0.0, digits=3),
    Claim("α of the best of n grows with the reward model", "Gao et al. 2023, fig. 3", "about linear in the logarithm"
          " of its parameters", slope("alpha"), "for ten times the parameters", above=0.0, digits=3),
    Claim("β falls", "Gao et al. 2023, fig. 3", "about linear in the logarithm, too", slope("beta"),
          "for ten times the parameters", below=0.0, digits=3),
    Claim("more can be gained by the best of n", "Gao et al. 2023, fig. 1", "the peak is higher", slope("gain"),
          "of true utility for ten times the parameters", above=0.0),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a size; wins against the largest SFT, and the best of n against the distance."""
    found = cells.finished()
    wins = [points_line(cells, found, "log_parameters", f"{name}_wins", name) for name in ("raw", "sft", "aligned")]
    curves = [curve_line(cells, variant, "distance", "gold", f"width {variant.width}") for variant in found]
    panels = [
        Panel("Raw, SFT, aligned", "log₁₀ parameters", "beats the largest SFT, share", wins),
        Panel("The best of n by reward models", "√KL, √nats", "true utility", curves),
    ]
    return Page([variants_table(cells, ["width"], columns) for columns in (POLICY_COLUMNS, REWARD_COLUMNS)], panels)


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each size's means over seeds."""
    widths = (cfg.widths[0], cfg.widths[-1]) if cfg.quick else cfg.widths
    variants = [Variant(width) for width in widths]
    return run_grid(cfg, "sizes", variants, one, present, prepare=prepare, axes=("widths",))


if __name__ == "__main__":
    run_main(main, Config)
