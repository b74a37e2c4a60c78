"""Trains a Bradley-Terry reward model on human comparisons, starting from the SFT weights.

Ouyang et al. 2022, eq. 1 (https://arxiv.org/abs/2203.02155): all K(K−1)/2 pairs of a prompt's K ranked answers are
one batch element; K = 2 is a plain pair. At the end the head's bias is moved so that demonstrations, if there are any,
score 0 on average. The new head is initialised with std 1/√(d+1) (Huang et al. 2024,
https://arxiv.org/abs/2403.17031).
    python experiments/reward_model.py
    python experiments/reward_model.py --model FOLDER --comparisons FILE
It takes about 4 minutes on 2 CPU cores. In the controlled world it runs SFT first. The reward model agrees there with
held-out annotators about 76% of the time; their noise allows 80%, and "pick the longer" reaches 56%. It writes
reward_model/ to the run's folder. With --members 4 it trains an ensemble, from seeds of their own on the same
comparisons, and writes reward_model_1/ to reward_model_4/.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jaxtyping import Float, PRNGKeyArray

from experiments.flags import (
    ComparisonFlags,
    DemonstrationFlags,
    Flags,
    ModelFlags,
    RunFlags,
    SamplingFlags,
)
from experiments.reports import reward_model_report
from experiments.stages import member_names, open_task, or_default, policy_sampler, pretrained_defaults, say_defaults
from experiments.training import AdapterDropout, Adapters, Training
from rlhf_jax.batches import PackedRankings, Rankings, Tokens
from rlhf_jax.cli import on_mesh, run_main, run_with_report
from rlhf_jax.data.preferences import stack_batches
from rlhf_jax.drawn import DrawnRankings
from rlhf_jax.ensemble import ensemble_metrics
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.evaluate import agreement
from rlhf_jax.export import export_reward_model
from rlhf_jax.log import Run
from rlhf_jax.loop import microbatch_shape, shard_stacked
from rlhf_jax.losses import ranking_loss
from rlhf_jax.losses.reward_model import ranking_counts
from rlhf_jax.models import ModelConfig, ScalarModel, from_language_model, with_lora
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.scoring import ranking_rewards, response_rewards, score_in_batches
from rlhf_jax.sharding import shard_params
from rlhf_jax.tasks.measure import write_pairs
from rlhf_jax.tasks.task import Comparisons
from rlhf_jax.train import make_state, make_train_step
from rlhf_jax.types import Metrics, Params


@dataclass(frozen=True)
class RewardModelFlags(Flags):
    """The flags of reward-model training alone."""

    epochs: float | None = None
    """Passes over the comparisons. By default 2 in the controlled world, else 1."""
    steps: int | None = None
    """Steps instead of passes; of a stream 1000 by default."""
    prompts_per_step: int = 16
    """Prompts in a step, each with all of its K answers."""
    evaluations: int = 8
    """The number of evaluations on held-out comparisons."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range, and for a length that is given twice."""
        at_least(self, prompts_per_step=1, evaluations=1)
        for name in ("epochs", "steps"):
            if getattr(self, name) is not None:
                at_least(self, **{name: 0})
        if self.epochs is not None and self.steps is not None:
            raise UserError("--epochs and --steps both say how long to train: give one of them")
        super().__post_init__()


@dataclass(frozen=True)
class RewardModel(Adapters, AdapterDropout, Training, RewardModelFlags):
    """The flags of the stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_parts(self.prompts_per_step, "prompts")


@dataclass(frozen=True)
class MemberFlags(Flags):
    """How many reward models there are."""

    members: int = 1
    """Reward models to train, each with a new head and an order of the data of its own: an ensemble for
    --reward-ensemble."""

    def __post_init__(self) -> None:
        at_least(self, members=1)
        super().__post_init__()


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, ModelFlags, DemonstrationFlags, ComparisonFlags, MemberFlags, RewardModel):
    """A reward model from comparisons."""


def with_defaults(cfg: RewardModel, base: Pretrained, *, streamed: bool = False) -> RewardModel:
    """The flags. Those that are not given get numbers for the model. Raises UserError for epochs of a stream."""
    if streamed and cfg.epochs is not None:
        raise UserError("a stream has no passes to count: give --steps instead of --epochs")
    length: dict[str, Any] = {} if cfg.steps is not None else {"steps": 1000} if streamed else {"epochs": 1}
    if base.name is None:
        return or_default(cfg, **({"epochs": 2} if length else {}), learning_rate=1e-3, lora_rank=0)
    return or_default(cfg, **length, **pretrained_defaults(cfg, base))


def make_step(cfg: RewardModel, config: ModelConfig) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns train_step(state, rankings, frozen, step, dropout_key) -> (state, metrics)."""
    model = ScalarModel(config)

    def loss_fn(
        trainable: Params, batch: Rankings | PackedRankings, frozen: Params, step: Any, dropout_key: PRNGKeyArray
    ) -> tuple[Any, Metrics]:
        params = cfg.model_in_training(frozen, trainable, dropout_key, step)
        margin = batch.margin if isinstance(batch, PackedRankings) else 0.0  # the world's annotators give none
        rewards = ranking_rewards(model, params, batch)
        return ranking_loss(rewards, batch.ranks, batch.mask, margin=margin, label_smoothing=batch.doubt)

    counts = (lambda batch: ranking_counts(batch.ranks, batch.mask)) if cfg.accumulate > 1 else None
    return make_train_step(loss_fn, counts=counts)


class Programs(NamedTuple):
    """Everything that members of an ensemble compile once for all of them."""

    model: ScalarModel
    optimizer: optax.GradientTransformation
    train_step: Callable[..., tuple[TrainState, Metrics]]
    score: Callable[[Params, Tokens], np.ndarray]


@lru_cache(maxsize=1)
def make_programs(cfg: RewardModel, config: ModelConfig, steps: int, eval_batch_size: int) -> Programs:
    """The programs of a stage of so many steps; those of the last call where it was alike."""
    model = ScalarModel(config)
    score = score_in_batches(partial(response_rewards, model), eval_batch_size)
    return Programs(model, cfg.make_optimizer(steps), make_step(cfg, config), score)


def train(
    cfg: RewardModel,
    base: Pretrained,
    comparisons: Comparisons,
    run: Run,
    seed: int,
    *,
    eval_batch_size: int,
    zero: Tokens | None = None,
    start: Params | None = None,
    stage: str = "reward_model",
) -> tuple[Params, dict[str, float]]:
    """Trains `base` with a scalar head. Returns the parameters, adapters not merged, and the final metrics.

    `start` is a reward model of that shape to go on from; by default a new head on the weights of `base`.
    If `zero` is given, the head's bias is moved at the end so that the answers in it score 0 on average.
    """
    given, cfg = cfg, with_defaults(cfg, base, streamed=comparisons.stream is not None)
    say_defaults(run, stage, given, cfg, base)
    if start is None:
        params = from_language_model(shard_params(base.params), jax.random.key(seed + 1), base.config)
    else:
        params = shard_params(start)
    prompts = len(comparisons.train)
    prompts_a_step = cfg.prompts_per_step if comparisons.stream else min(prompts, cfg.prompts_per_step)
    cfg.check_parts(prompts_a_step, "prompts")
    steps = math.ceil((cfg.epochs or 0) * (prompts // prompts_a_step)) if cfg.steps is None else cfg.steps
    frozen, trainable = shard_params(cfg.split_trainable(params, jax.random.key(seed + 3)))
    del params  # which may stand beside its rounded weights
    model, optimizer, train_step, score = make_programs(cfg, base.config, steps, eval_batch_size)
    state, dropout_key = make_state(model, trainable, optimizer), jax.random.key(seed + 5)

    def evaluate(params: Params) -> dict[str, Any]:
        return agreement(score(params, comparisons.heldout.responses), comparisons.heldout)

    loop = cfg.make_loop(run, stage, steps, show=("loss", "accuracy", "val_accuracy"), log_every=20)
    state = loop.restore(state)
    drawn = DrawnRankings(comparisons.train, comparisons.stream, prompts_a_step, seed, loop)
    for step in loop:
        parts = [comparisons.lay(part) for part in drawn.parts(step, cfg.accumulate)]
        batch = shard_stacked(stack_batches(parts), cfg.accumulate)
        if step == loop.first:
            shape = microbatch_shape(batch, cfg.accumulate)
            loop.say_memory(base.config, state.params, (state, frozen), shape, adapters=bool(frozen))
        state, trained = train_step(state, batch, frozen, step, dropout_key)
        metrics: dict[str, Any] = {**trained}
        loop.watch_skipped(step, metrics["skipped"], batch)
        evaluated = (step + 1) % max(1, steps // cfg.evaluations) == 0 or loop.is_last(step)
        if evaluated:
            metrics |= evaluate(with_lora(frozen, state.params))
        best = metrics.get("val_accuracy")
        loop.end_step(step, state, metrics, evaluated=evaluated, best=best, data_state=drawn.data_state)

    params = with_lora(frozen, jax.tree.map(jnp.copy, state.params))
    if zero is not None:  # Ouyang et al. 2022, §3.5
        params["head"]["bias"] -= score(params, zero).mean()
    found = evaluate(params) | comparisons.facts
    if zero is not None:
        found["demonstrations_score"] = score(params, zero).mean()
    return params, named(stage, found)


def named(stage: str, found: dict[str, Any]) -> dict[str, float]:
    """A stage's final metrics by their names, with shares of the ceiling where it is known."""
    if "ceiling" in found:
        found |= {
            "share_of_ceiling": found["val_accuracy"] / found["ceiling"],
            "share_above_chance": (found["val_accuracy"] - 0.5) / (found["ceiling"] - 0.5),
        }
    return {f"{stage}_{name}": float(value) for name, value in found.items()}


def member_seed(seed: int, number: int) -> int:
    """The seed of a member of an ensemble, from 0; the first one is trained as a reward model alone."""
    return seed + 10_000 * number


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, exports the reward model, and returns the final metrics."""
    stages = member_names(cfg.members)
    with run_with_report(cfg, "reward_model", reward_model_report(stages)) as run:
        task = open_task(cfg, run, first="sft")
        sampler = policy_sampler(cfg, task)
        comparisons = task.comparisons(partial(sampler, task.base.params))
        zero = task.demonstrations().validation if task.has_demonstrations else None
        score = score_in_batches(partial(response_rewards, ScalarModel(task.base.config)), task.eval_batch_size)
        metrics: dict[str, float] = {}
        scores = []
        for number, stage in enumerate(stages):
            params, found = train(
                cfg, task.base, comparisons, run, member_seed(cfg.seed, number), eval_batch_size=task.eval_batch_size,
                zero=zero, stage=stage,
            )  # fmt: skip
            metrics |= found
            task.finish()
            scores.append(score(params, comparisons.heldout.responses))
            export_reward_model(
                run, task.base, params, algorithm="Bradley-Terry reward model from comparisons", metrics=found,
                name=stage,
            )  # fmt: skip
        if len(stages) > 1:
            metrics |= ensemble_of(run, np.stack(scores), comparisons)
        run.summary(metrics)
        write_pairs(run, task.base, comparisons.heldout, np.mean(scores, axis=0))
    return metrics


def ensemble_of(run: Run, scores: Float[np.ndarray, "k N"], comparisons: Comparisons) -> dict[str, float]:
    """The metrics of the mean of all members' scores, as those of one reward model, and how far they disagree."""
    heldout = comparisons.heldout
    found = agreement(scores.mean(axis=0), heldout) | comparisons.facts | ensemble_metrics(scores, heldout)
    run.say(
        f"{len(scores)} members: their mean predicts {found['val_accuracy']:.1%} of held-out comparisons; two of them"
        f" differ on {found['disagreement']:.1%}"
    )
    return named("reward_model", found)


if __name__ == "__main__":
    run_main(main, Config)
