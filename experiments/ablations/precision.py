"""The effect of bfloat16 arithmetic: SFT, reward model and PPO in float32 and in mixed precision.

Micikevicius et al. 2017 (https://arxiv.org/abs/1710.03740), who used float16. Each seed has one whole run in each
precision, on the answers that this run samples. The initial weights and the order of the data are the same; only
arithmetic differs.
    python experiments/ablations/precision.py
It takes about 15 minutes on 2 CPU cores, which emulate bfloat16. The first table has each seed's final numbers, the
differences between precisions seed by seed, and the spread over seeds. The second table has SFT trained in one
precision and sampled in the other. The figure shows PPO's curves. Real text (flags as for pipeline.py) has no true
utility. Speed and memory are not measured here: they need an accelerator.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ppo, reward_model, sft
from experiments.ablations.grid import GridFlags, only_words, run_grid
from experiments.ablations.grid_results import Cells, Column, Page, Panel, Table, curve_line, differences_table, listed
from experiments.flags import (
    PRECISIONS,
    ComparisonFlags,
    DemonstrationFlags,
    ModelFlags,
    PrecisionName,
    PromptFlags,
    SamplingFlags,
)
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.sft import SFT
from experiments.stages import open_task, policy_sampler
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import Transformer
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.sampling.sampler import make_sampler
from rlhf_jax.tasks.measure import make_utility_measure
from rlhf_jax.tasks.task import Task
from rlhf_jax.types import Params

NUMBERS: dict[str, tuple[str, str, Callable[[list[float]], Any]]] = {
    "SFT: validation loss": ("sft", "val_loss", lambda values: values[-1]),
    "SFT: true utility": ("sft", "utility", lambda values: values[-1]),
    "reward model: held-out accuracy": ("reward_model", "val_accuracy", lambda values: values[-1]),
    "PPO: true utility": ("ppo", "utility", lambda values: np.mean(values[-5:])),
    "PPO: KL to SFT": ("ppo", "kl_k1", lambda values: np.mean(values[-5:])),
    "PPO: log-probabilities of sampler and trainer differ by, mean": ("ppo", "sampler_gap", max),
    "PPO: the same, 95th percentile": ("ppo", "sampler_gap_p95", max),
    "PPO: the same, most": ("ppo", "sampler_gap_max", max),
}
"""A stage's metric, and which of its values counts: the last, the mean of the last five, or the worst iteration's."""


@dataclass(frozen=True)
class Config(GridFlags, SamplingFlags, ModelFlags, DemonstrationFlags, ComparisonFlags, PromptFlags):
    """The same stages in several precisions, several seeds."""

    seeds: int = 3
    precisions: tuple[PrecisionName, ...] = ("float32", "mixed")
    """The precisions. The others are compared with the first one."""
    stages: tuple[Literal["sft", "reward_model", "ppo"], ...] = ("sft", "reward_model", "ppo")
    """The stages to run: the first, the first two, or all three."""
    comparisons_used: int = 3000
    """In the controlled world: prompts whose answers the reward model learns from."""
    sft: SFT = field(default_factory=lambda: SFT(steps=500))
    reward_model: RewardModel = field(default_factory=lambda: RewardModel(epochs=1))
    ppo: PPO = field(default_factory=lambda: PPO(steps=25))

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        super().__post_init__()
        at_least(self, comparisons_used=1)


class Variant(NamedTuple):
    """The precision that everything is computed in."""

    precision: PrecisionName


def one(cfg: Config, prepared: None, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """The stages in one precision: what each ends at, PPO's curves, and how SFT does when sampled in any precision."""
    cfg = replace(cfg, seed=seed, precision=variant.precision)
    task = open_task(cfg, run)
    params = train(cfg, task, run)
    rows = read_metrics(run.dir)
    numbers: dict[str, Any] = {}
    for name, (stage, metric, which) in NUMBERS.items():
        values = [row[metric] for row in rows.get(stage, []) if row.get(metric) is not None]
        if values:
            numbers[name] = which(values)
            numbers[f"{stage}_{metric}"] = values
    return numbers | sampled_in_each(cfg, task, params)


def train(cfg: Config, task: Task, run: Run) -> Params:
    """The stages, in one precision; returns SFT's weights."""
    sampler, demonstrations, size = policy_sampler(cfg, task), task.demonstrations(), task.eval_batch_size
    measure = make_utility_measure(task, sampler)
    params = sft.train(cfg.sft, task.base, demonstrations, run, cfg.seed, eval_batch_size=size, measure=measure).params
    if "reward_model" not in cfg.stages:
        return params
    base, compared = task.base._replace(params=params), task.comparisons(partial(sampler, params))
    if not compared.packed:
        compared = compared._replace(train=compared.train[: cfg.comparisons_used])
    rewards, _ = reward_model.train(
        cfg.reward_model, base, compared, run, cfg.seed, eval_batch_size=size, zero=demonstrations.validation
    )
    if "ppo" in cfg.stages:
        ppo.train(
            cfg.ppo, base, task.prompts(), [model_reward(base.config, rewards, name="reward_model", weight=1.0)], run,
            cfg.seed, max_new_tokens=task.max_new_tokens, critic=(base.config, rewards), judge=task.judge,
        )  # fmt: skip
    return params


def sampled_in_each(cfg: Config, task: Task, params: Params) -> dict[str, float]:
    """SFT's true utility on PPO's prompts and its standard error, sampled in each precision; {} without a judge."""
    found: dict[str, float] = {}
    for name in cfg.precisions if task.judge is not None else ():
        base, asked = task.base, task.prompts().train
        config = replace(base.config, precision=PRECISIONS[name])
        sampler = make_sampler(
            config, seed=cfg.seed, max_new_tokens=task.max_new_tokens, temperature=1.0, eos_id=base.eos_id,
            pad_id=base.pad_id, batch_size=task.eval_batch_size,
        )  # fmt: skip
        like = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
        weights = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), params, like)
        assert task.judge is not None
        utility = task.judge(asked, sampler(weights, asked, 0))
        found |= {f"sampled_in_{name}": utility.mean(), f"se_in_{name}": utility.std(ddof=1) / len(utility) ** 0.5}
    return found


def present(cfg: Config, cells: Cells) -> Page:
    """A row a number, with differences; SFT as trained and as sampled; PPO's curves."""
    found = cells.finished()
    tables = [differences_table(cells, found[0], [Column(name, name) for name in NUMBERS])]
    rows = [
        [variant.precision, name, listed(utility), f"{cells.numbers(variant, f'se_in_{name}').max():.2g}"]
        for variant in found
        for name in cfg.precisions
        if len(utility := cells.numbers(variant, f"sampled_in_{name}"))
    ]
    if rows:
        tables.append(Table(["trained in", "sampled in", "true utility of SFT, each seed", "standard error"], rows))
    panels = [
        Panel(title, "iteration", title, [curve_line(cells, v, None, name, v.precision) for v in shown])
        for title, name in {"PPO: true utility": "ppo_utility", "PPO: KL to SFT, nats": "ppo_kl_k1"}.items()
        if (shown := [variant for variant in found if len(cells.numbers(variant, name))])
    ]
    return Page(tables, panels)


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each precision's means over seeds. Raises UserError for --precision."""
    only_words(cfg, quick=False)
    if cfg.precision != "float32":
        raise UserError("--precision is not read here: give --precisions")
    return run_grid(cfg, "precision", [Variant(name) for name in cfg.precisions], one, present)


if __name__ == "__main__":
    run_main(main, Config)
