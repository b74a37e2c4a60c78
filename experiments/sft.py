"""Supervised fine-tuning (SFT) on demonstrations. The loss is on the answers only.

Ouyang et al. 2022, §3.5 (https://arxiv.org/abs/2203.02155): several epochs, cosine decay.
    python experiments/sft.py
    python experiments/sft.py --model FOLDER --demonstrations FILE
It takes about a minute on 2 CPU cores. In the controlled world the true utility of samples ends at the demonstrators'
mean or a little below: a model that imitates gets no better than its examples. It writes policy/ to the run's folder.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState
from jaxtyping import PRNGKeyArray

from experiments.flags import (
    DemonstrationFlags,
    Flags,
    ModelFlags,
    RunFlags,
    SamplingFlags,
)
from experiments.reports import SFT_REPORT
from experiments.stages import open_task, or_default, policy_sampler, pretrained_defaults, say_defaults
from experiments.training import AdapterDropout, Adapters, Training
from rlhf_jax import checkpoint
from rlhf_jax.adapters import merged_on_host
from rlhf_jax.batches import Tokens
from rlhf_jax.cli import on_mesh, run_main, run_with_report
from rlhf_jax.errors import at_least
from rlhf_jax.export import export_policy
from rlhf_jax.hosts import from_first
from rlhf_jax.log import Run
from rlhf_jax.loop import Loop, gather_data_state, microbatch_shape, set_data_state, shard_microbatches
from rlhf_jax.models import ModelConfig, Transformer, with_lora
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.scoring import mean_in_batches, sft_objective
from rlhf_jax.sharding import create, shard_params
from rlhf_jax.tasks.measure import make_utility_measure, sample_examples
from rlhf_jax.tasks.task import Demonstrations
from rlhf_jax.train import make_state, make_train_step
from rlhf_jax.types import Metrics, Params

Measure = Callable[[Params, int], dict[str, Any]]
"""measure(params, number) -> metrics of a policy. They are only logged; training does not use them."""


@dataclass(frozen=True)
class SFTFlags(Flags):
    """The flags of supervised fine-tuning alone."""

    steps: int | None = None
    """Training steps. By default 2500 in the controlled world, else as many as the epochs take. 0 trains nothing."""
    epochs: float = 2.0
    """Passes over the demonstrations, if no --steps are given."""
    batch_size: int = 16
    """Packed rows in a step. In the controlled world a row has about 3.6 demonstrations."""
    evaluations: int = 8
    """The most evaluations of the loss on held-out demonstrations. They are at the ends of epochs."""

    def __post_init__(self) -> None:
        at_least(self, batch_size=1, evaluations=1)
        if self.steps is not None:
            at_least(self, steps=0)
        super().__post_init__()


@dataclass(frozen=True)
class SFT(Adapters, AdapterDropout, Training, SFTFlags):
    """The flags of the stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_parts(self.batch_size, "rows")


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, ModelFlags, DemonstrationFlags, SFT):
    """Supervised fine-tuning."""


class Trained(NamedTuple):
    """The weights after training, and at the ends of epochs if these were kept."""

    params: Params
    """Plain parameters on the host, adapters merged."""
    epochs: list[int]
    """Steps after which weights were kept."""
    load: Callable[[int], Params]
    """load(step) reads the weights of that step from the disk."""


def with_defaults(cfg: SFT, base: Pretrained, rows: int | None) -> SFT:
    """The flags. Those that are not given get numbers for the model and the data."""
    if base.name is None:
        return or_default(cfg, steps=2500, learning_rate=5e-3, lora_rank=0)
    steps = math.ceil(cfg.epochs * rows / min(cfg.batch_size, rows)) if rows else 1000
    return or_default(cfg, steps=max(1, steps), **pretrained_defaults(cfg, base))


def ends_of_epochs(steps: int, rows: int | None, batch_size: int, most: int) -> list[int]:
    """Steps after which to evaluate: ends of epochs, at most `most`, with the last step.

    A stream has no epochs: it has four evaluations, evenly spaced.
    """
    an_epoch = max(1, steps // 4 if rows is None else rows // batch_size)
    ends = sorted({*range(an_epoch, steps, an_epoch), steps} - {0})
    return [ends[-1 - i * len(ends) // most] for i in reversed(range(most))] if len(ends) > most else ends


def make_step(cfg: SFT, config: ModelConfig, dropout_key: PRNGKeyArray) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns train_step(state, batch, frozen, step) -> (state, metrics)."""
    model = Transformer(config)

    def loss_fn(trainable: Params, batch: Tokens, frozen: Params, step: Any) -> tuple[Any, Metrics]:
        return sft_objective(model, cfg.model_in_training(frozen, trainable, dropout_key, step), batch)

    return make_train_step(loss_fn, counts=(lambda batch: {"loss": batch.mask.sum()}) if cfg.accumulate > 1 else None)


def train(
    cfg: SFT,
    base: Pretrained,
    demonstrations: Demonstrations,
    run: Run,
    seed: int,
    *,
    eval_batch_size: int,
    measure: Measure | None = None,
    keep_epochs: bool = False,
    stage: str = "sft",
) -> Trained:
    """Trains `base` on the demonstrations. `measure` measures the policy at the ends of epochs.

    `keep_epochs` keeps the weights at the ends of epochs on the disk.
    """
    given, cfg = cfg, with_defaults(cfg, base, demonstrations.rows)
    if cfg.steps == 0:
        run.say(f"{stage}: 0 steps, so nothing is trained")
    else:
        say_defaults(run, stage, given, cfg, base)
    steps = cfg.steps or 0
    model, key = Transformer(base.config), jax.random.key(seed)
    params = base.params
    if params is None:
        params = create(lambda: model.init(key, jnp.zeros((1, 8), jnp.int32))["params"])
    frozen, trainable = shard_params(cfg.split_trainable(params, jax.random.fold_in(key, 1)))
    state = make_state(model, trainable, cfg.make_optimizer(steps))
    train_step = make_step(cfg, base.config, jax.random.fold_in(key, 2))
    validation_loss = mean_in_batches(lambda params, tokens: sft_objective(model, params, tokens)[0], eval_batch_size)

    rows = demonstrations.rows
    batch_size = cfg.batch_size if rows is None else min(rows, cfg.batch_size)
    cfg.check_parts(batch_size, "rows")
    ends = ends_of_epochs(steps, rows, batch_size, cfg.evaluations)
    loop = cfg.make_loop(run, stage, steps, show=("loss", "val_loss", "utility"), log_every=20)
    state, epochs = resume(loop, state, ends, keep_epochs)
    batches = demonstrations.batches(batch_size, seed)
    set_data_state(batches, loop.data_state() if loop.first < steps else None)
    for step in loop:
        batch = shard_microbatches(next(batches), cfg.accumulate, host_rows=True)
        if step == loop.first:
            shape = microbatch_shape(batch, cfg.accumulate)
            loop.say_memory(base.config, state.params, (state, frozen), shape, adapters=bool(frozen))
        state, trained = train_step(state, batch, frozen, step)
        metrics: dict[str, Any] = {**trained}
        loop.watch_skipped(step, metrics["skipped"], batch)
        evaluated = step + 1 in ends
        if evaluated:
            if keep_epochs:
                run.save(epochs, step + 1, {"params": state.params})
            params = with_lora(frozen, state.params)
            metrics["val_loss"] = validation_loss(params, demonstrations.validation)
            if measure is not None:
                metrics |= measure(params, ends.index(step + 1) + 1)
        loop.end_step(
            step, state, metrics, evaluated=evaluated,
            best=-metrics["val_loss"] if evaluated else None, data_state=gather_data_state(batches),
        )  # fmt: skip

    trained_params, like = merged_on_host(frozen, state.params), {"params": state.params}
    if not keep_epochs:
        return Trained(trained_params, [], nothing_kept)

    def load(end: int) -> Params:
        return merged_on_host(frozen, checkpoint.restore(run.dir, epochs, end, like=like)["params"])

    return Trained(trained_params, ends, load)


def nothing_kept(end: int) -> Params:
    """Raises KeyError: no epochs were kept."""
    raise KeyError(end)


def resume(loop: Loop, state: TrainState, ends: list[int], keep_epochs: bool) -> tuple[TrainState, str]:
    """The state that the loop begins with, and the name under which weights at ends of epochs are kept.

    They are checkpoints of their own. A resumed run goes on from before the first one that is missing or damaged.
    """
    run, epochs, missing = loop.run, f"{loop.stage}_epochs", math.inf
    if run.resumed and keep_epochs:
        for line in from_first(lambda: checkpoint.set_aside_damaged(run.dir, epochs)):
            run.warn(line)
        folder = run.dir / "checkpoints" / epochs
        have = from_first(lambda: [end for end in ends if (folder / str(end)).exists()])
        missing = next((end for end in ends if end not in have), math.inf)
    return loop.restore(state, before=missing), epochs


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, exports the policy, and returns the final metrics."""
    with run_with_report(cfg, "sft", SFT_REPORT) as run:
        task = open_task(cfg, run)
        sampler = policy_sampler(cfg, task)
        measure = make_utility_measure(task, sampler)
        trained = train(
            cfg, task.base, task.demonstrations(), run, cfg.seed, eval_batch_size=task.eval_batch_size, measure=measure
        )
        task.finish()
        metrics = dict(task.facts)
        metrics |= {f"sft_{name}": float(value) for name, value in measure(trained.params, 0).items()}
        metrics |= sample_examples(run, task, "sft", trained.params, sampler)
        run.summary(metrics)
        export_policy(run, task.base, trained.params, algorithm="Supervised fine-tuning", metrics=metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
