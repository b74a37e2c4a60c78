"""Ensembles of reward models against over-optimisation: one model, and the mean, the least, mean − λ·std of four.

Coste et al. 2023 (https://arxiv.org/abs/2310.02743), and averaged weights (WARM, Ramé et al. 2024,
https://arxiv.org/abs/2401.12187), in the controlled world, where the true utility is known. Each seed has a world, an
SFT policy and reward models of its own, trained on the same comparisons from seeds of their own. Coste et al. turn a
quarter of the labels round; here a fifth of them goes against what the annotators perceive (1 − ceiling). PPO starts
from SFT's last weights, the critic from the first reward model; the best of n is picked from SFT's answers. Each
member has a new head of its own, but those whose weights are averaged begin from one head, as in WARM.
    python experiments/ablations/ensemble.py
Expect about 2 hours on 2 CPU cores for 5 seeds. It draws proxy and true utility against √KL.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations.claims import Claim, Numbers, minus, of
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, curve_line, seeds_table, variants_table
from experiments.ablations.kl_coefficient import curved, curves_of, make_train
from experiments.ablations.reward_data import best_of_pool
from experiments.ablations.worlds import AfterSFT, after_sft, sft_pool
from experiments.ppo import PPO
from experiments.reward_model import RewardModel, member_seed
from experiments.reward_model import train as train_rewards
from experiments.sft import SFT
from rlhf_jax.cli import run_main
from rlhf_jax.ensemble import ensemble_metrics, ensemble_reward
from rlhf_jax.errors import at_least
from rlhf_jax.evaluate import agreement
from rlhf_jax.log import Run
from rlhf_jax.models import ModelConfig, ScalarModel, from_language_model
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.rewards.reward import Reward
from rlhf_jax.scoring import response_rewards, score_in_batches
from rlhf_jax.tasks.measure import compare_policies, make_reward_scorer
from rlhf_jax.types import Params

CombinationOrOne = Literal["one", "mean", "min", "lower", "uwo", "weights"]
SEED_COLUMNS = (
    Column("SFT", "sft_utility", 3), Column("one model agrees", "one_val_accuracy", 3),
    Column("their mean", "val_accuracy", 3), Column("ceiling", "ceiling", 3),
    Column("two members differ", "disagreement", 3), Column("spread of a pair's difference", "spread", 3),
)  # fmt: skip
COLUMNS = (
    Column("KL at the end, nats", "kl", 1, extremes=True), Column("true utility", "ppo_utility"),
    Column("at its peak", "peak"), Column("proxy", "ppo_score"), Column("beats SFT", "win_rate", 3, extremes=True),
    Column("length", "ppo_length", 1), Column("best of n gains", "best_gain"), Column("off its peak", "best_lost"),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """PPO against one reward model and against several as one, several seeds."""

    betas: tuple[float, ...] = (0.0, 0.1)
    combinations: tuple[CombinationOrOne, ...] = ("one", "mean", "min", "lower", "weights")
    """one is the first member alone; uwo is mean − λ·variance."""
    members: int = 4
    ensemble_lambda: float = 1.0
    """λ of lower and uwo."""
    n: int = 64
    """The most answers of which the best is picked."""
    prompts: int = 256
    """Prompts on which it is."""
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=lambda: PPO(steps=120))
    """PPO runs twice the pipeline's iterations, so that over-optimisation shows."""

    def __post_init__(self) -> None:
        at_least(self, members=2, ensemble_lambda=0, n=8, prompts=1)  # of fewer answers there is no curve to fit
        super().__post_init__()


class Variant(NamedTuple):
    """How the reward models become one, and a weight of the KL term."""

    combination: CombinationOrOne
    beta: float


class Prepared(NamedTuple):
    """A seed's world and SFT, each combination with PPO against it and the best of n by it, and facts about all."""

    begun: AfterSFT
    trains: Mapping[CombinationOrOne, tuple[Reward, Callable[..., Any]]]
    best: Mapping[CombinationOrOne, dict[str, float]]
    facts: dict[str, float]


def prepare(cfg: Config, seed: int, run: Run) -> Prepared:
    """A world, SFT, the reward models, and PPO against each combination, compiled once for all β."""
    begun = after_sft(cfg, seed, run)
    task, base, heldout = begun.task, begun.base, begun.comparisons.heldout
    size, zero = task.eval_batch_size, task.demonstrations().validation

    def trained(number: int, start: Params | None = None) -> tuple[Params, dict[str, float]]:
        return train_rewards(
            cfg.reward_model, base, begun.comparisons, run, member_seed(seed, number), eval_batch_size=size, zero=zero,
            start=start, stage=f"reward_model_{number + 1}{'_alike' if start else ''}",
        )  # fmt: skip

    first, of_first = trained(0)
    members = [first, *(trained(number)[0] for number in range(1, cfg.members))]
    score = score_in_batches(partial(response_rewards, ScalarModel(base.config)), size)
    scores = np.stack([score(params, heldout.responses) for params in members])
    facts = ensemble_metrics(scores, heldout) | begun.comparisons.facts | agreement(scores.mean(axis=0), heldout)
    facts["one_val_accuracy"] = of_first["reward_model_1_val_accuracy"]
    alike = [first]
    if "weights" in cfg.combinations:
        start = from_language_model(base.params, jax.random.key(seed + 1), base.config)  # as the first member begins
        alike += [trained(number, start)[0] for number in range(1, cfg.members)]
    heldout_prompts, pool = sft_pool(cfg, task, begun.sampler, seed, cfg.n, cfg.prompts)
    trains, best = {}, {}
    for name in cfg.combinations:
        reward = reward_of(cfg, base.config, alike if name == "weights" else members, name)
        train = make_train(cfg.ppo, base, task.prompts().train, reward, members[0], max_new_tokens=task.max_new_tokens)
        trains[name] = reward, jax.jit(train)
        scorer = make_reward_scorer(task, [reward], cfg.ppo.no_end_score)
        gold = best_of_pool(task, scorer, heldout_prompts, pool, cfg.n)["gold"]
        best[name] = {"best_gain": gold[-1] - gold[0], "best_lost": gold.max() - gold[-1]}
    return Prepared(begun, trains, best, facts)


def reward_of(cfg: Config, config: ModelConfig, members: Sequence[Params], name: CombinationOrOne) -> Reward:
    """A combination of the reward models by its name; "one" is the first of them."""
    if name == "one":
        return model_reward(config, members[0], name="one", weight=1.0)
    return ensemble_reward(config, members, combine=name, lam=cfg.ensemble_lambda, name=name, weight=1.0)


def one(cfg: Config, prepared: Prepared, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """PPO against one combination at one β: where it ends beside SFT, and its curves."""
    begun, (reward, train) = prepared.begun, prepared.trains[variant.combination]
    policy, *seen = jax.tree.map(np.asarray, train(jax.random.key(seed + 2), jnp.float32(variant.beta)))
    scorer = make_reward_scorer(begun.task, [reward], cfg.ppo.no_end_score)
    policies = ("sft", begun.base.params), ("ppo", policy)
    found = compare_policies(run, begun.task, *policies, begun.sampler, scorer)
    facts = prepared.facts | prepared.best[variant.combination]
    return facts | found | curved(seen[0], *curves_of(begun.task, *seen))


def above_one(combination: str, key: str = "ppo_utility") -> Numbers:
    """True utility at the end of PPO without a KL term, or another number there, above that of one reward model."""
    return minus(of(key, combination=combination, beta=0.0), of(key, combination="one", beta=0.0))


CLAIMS = (
    Claim("the least of four rewards is over-optimised less", "Coste et al. 2023, §5.2", "worst-case reduces it"
          " without a KL term, and does not end it",
          above_one("min"), "of true utility above one reward model's, β = 0", above=0.0),
    Claim("so is mean − λ·std", "Coste et al. 2023, §5.2", "uncertainty-weighted optimisation reduces it",
          above_one("lower"), "of true utility above one reward model's, β = 0", above=0.0),
    Claim("averaged weights beat one model", "Ramé et al. 2024 (WARM)", "79% wins against one",
          above_one("weights"), "of true utility above one reward model's, β = 0", above=0.0),
    Claim("the mean does less than the least", "Coste et al. 2023", "under noise it is still over-optimised",
          minus(above_one("min"), above_one("mean")), "of true utility between them, β = 0", above=0.0),
    Claim("with a small KL term PPO against the least is not over-optimised", "Coste et al. 2023", "no peak",
          minus(of("peak", combination="min", beta=0.1), of("ppo_utility", combination="min", beta=0.1)),
          "of true utility from its peak", below=0.2),
    Claim("the best of 64 by the least of four is better", "Coste et al. 2023", "up to 70% better",
          above_one("min", "best_gain"), "of true utility above the best by one reward model", above=0.0),
    Claim("and it is not over-optimised", "Coste et al. 2023", "practically none", of("best_lost", combination="min",
          beta=0.0), "of true utility from its peak, at n ≤ 64", below=0.05),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a seed, a row a combination and β; proxy and true utility against √KL at the least β."""
    found = cells.finished()
    least = min(variant.beta for variant in found)
    drawn = [variant for variant in found if variant.beta == least]
    proxy, truth = (
        [curve_line(cells, variant, "distance", y, variant.combination) for variant in drawn]
        for y in ("score", "utility")
    )
    xlabel = "√KL(π‖SFT), √nats"
    panels = [
        Panel(f"Proxy, β = {least:g}", xlabel, "the combination's score", proxy),
        Panel(f"Truth, β = {least:g}", xlabel, "true utility", truth),
    ]
    return Page(
        [seeds_table(cells, found[0], SEED_COLUMNS), variants_table(cells, ["combination", "β"], COLUMNS)], panels
    )


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each variant's means over seeds."""
    variants = [Variant(name, beta) for name in cfg.combinations for beta in cfg.betas]
    return run_grid(cfg, "ensemble", variants, one, present, prepare=prepare, axes=("betas", "combinations"))


if __name__ == "__main__":
    run_main(main, Config)
