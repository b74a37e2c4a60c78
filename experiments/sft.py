"""Supervised fine-tuning on demonstrations, the prompt masked.

Ouyang et al. 2022, §3.5 (https://arxiv.org/abs/2203.02155): several epochs, cosine decay, a checkpoint each.
    python experiments/sft.py
About a minute on 2 CPU cores. In the controlled world the samples' true utility ends at or a little below the
demonstrators' mean: imitation caps at the quality of what it imitates.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jaxtyping import PRNGKeyArray

from experiments.adapters import Dropping, in_training, split
from experiments.setting import Setting, Source, announce, load_setting
from experiments.training import (
    SkippedSteps,
    Training,
    check_parts,
    counts_of,
    data_state,
    make_optimizer,
    parts_of,
    save_due,
    set_data_state,
)
from rlhf_jax import checkpoint
from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import at_least
from rlhf_jax.hosts import from_first
from rlhf_jax.log import Run
from rlhf_jax.models import ModelConfig, Transformer, merge_lora, with_lora
from rlhf_jax.sampling import generate
from rlhf_jax.scoring import sft_objective
from rlhf_jax.sharding import create, shard_batch, shard_params, to_host
from rlhf_jax.train import make_state, make_train_step


@dataclass(frozen=True)
class SFT(Dropping, Training):
    """What supervised fine-tuning can be told."""

    steps: int = 2500
    batch_size: int = 16
    """Packed rows; in the controlled world about 3.6 demonstrations each."""
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, steps=1, batch_size=1)
        check_parts(self, self.batch_size, "rows")


@dataclass(frozen=True)
class Config(SFT, Source):
    """Supervised fine-tuning."""


def make_sampler(setting: Setting, params: Any, seed: int, *, batch_size: int = 1024):
    """sample(prompts, number) -> Completions at temperature 1, in batches of one shape."""
    model = Transformer(setting.model)

    def sample(prompts: Prompts, number: int) -> Completions:
        count = len(prompts.row)
        size = min(batch_size, count)
        parts = []
        for start in range(0, count, size):
            rows = np.arange(start, start + size) % count  # the last batch is filled up from the beginning
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), start)
            some = shard_batch(jax.tree.map(jnp.asarray, take(prompts, rows)))
            completions = generate(
                model, params, some.tokens, some.mask, key,
                max_new_tokens=setting.max_new_tokens, temperature=1.0, eos_id=setting.eos_id, pad_id=setting.pad_id,
            )  # fmt: skip
            parts.append(to_host(completions))
        return Completions(*(np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True)))

    return sample


def make_step(cfg: SFT, config: ModelConfig, dropout_key: PRNGKeyArray):
    """train_step(state, batch, frozen, step) -> (state, metrics)."""
    loss_fn = partial(sft_objective, Transformer(config))
    return make_train_step(
        lambda own, batch, frozen, step: loss_fn(in_training(cfg, frozen, own, dropout_key, step), batch),
        counts=counts_of(cfg, lambda batch: {"loss": batch.mask.sum()}),
    )


def make_validation_loss(setting: Setting):
    """validation_loss(params) -> float, over the validation demonstrations."""
    loss_fn = jax.jit(partial(sft_objective, Transformer(setting.model)))
    return lambda params: float(loss_fn(params, setting.validation)[0])


def resume(run: Run, state: TrainState, frozen: Any, ends: list[int]) -> tuple[TrainState, int, list[Any]]:
    """Where a resumed run goes on: the state, its step, and the parameters at the ends of epochs so far.

    These are checkpoints of their own, which are all kept; it goes on from before the first that is not whole.
    """
    lines = from_first(lambda: checkpoint.set_aside_damaged(run.dir, "sft_epochs")) if run.resumed else []
    for line in lines:
        run.warn(line)
    folder = run.dir / "checkpoints" / "sft_epochs"
    have = from_first(lambda: [end for end in ends if (folder / str(end)).exists()])
    missing = next((end for end in ends if end not in have), math.inf)
    state, first = run.restore("sft", state, before=missing)
    like = {"params": state.params}
    epochs = [checkpoint.restore(run.dir, "sft_epochs", end, like=like) for end in ends if end <= first]
    return state, first, [whole(frozen, epoch["params"]) for epoch in epochs]


def whole(frozen: Any, own: Any) -> Any:
    """Plain parameters on the host."""
    return to_host(merge_lora(with_lora(frozen, own)))


def train(cfg: SFT, setting: Setting, run: Run, seed: int) -> list[Any]:
    """Trains and returns the parameters at the end of each epoch, adapters merged, the last ones last."""
    model = Transformer(setting.model)
    key = jax.random.key(seed)
    params = setting.params
    if params is None:
        params = create(lambda: model.init(key, jnp.zeros((1, 8), jnp.int32))["params"])
    frozen, own = shard_params(split(cfg, jax.random.fold_in(key, 1), params))
    state = make_state(model, own, make_optimizer(cfg, cfg.steps))
    train_step = make_step(cfg, setting.model, jax.random.fold_in(key, 2))
    validation_loss = make_validation_loss(setting)

    rows = len(setting.demonstrations.mask)
    # A stream has no epochs: what is done after each is done four times in a run.
    steps_an_epoch = max(1, cfg.steps // 4 if setting.streaming else rows // cfg.batch_size)
    ends = sorted({*range(steps_an_epoch, cfg.steps, steps_an_epoch), cfg.steps})
    state, first, epochs = resume(run, state, frozen, ends)
    skipped = SkippedSteps(cfg, run, "sft")
    batches = setting.batches(cfg.batch_size, seed) if setting.batches else None
    check_parts(cfg, cfg.batch_size if batches is not None else min(rows, cfg.batch_size), "rows")
    if batches is not None and 0 < first < cfg.steps:
        set_data_state(batches, checkpoint.inspect(run.dir, "sft", first, files=False).data_state)
    for step in run.progress("sft", range(first, cfg.steps), show=("loss", "val_loss", "utility")):
        if batches is not None:
            batch = next(batches)
        else:
            if step % steps_an_epoch == 0 or step == first:
                permutation = np.random.default_rng([seed, 1, step // steps_an_epoch]).permutation(rows)
            start = step % steps_an_epoch * cfg.batch_size
            batch = take(setting.demonstrations, permutation[start : start + cfg.batch_size])
        batch = parts_of(cfg, batch, share=batches is not None)
        state, metrics = train_step(state, batch, frozen, step)
        skipped.watch(step + 1, metrics["skipped"], batch)
        if step + 1 in ends:
            run.save("sft_epochs", step + 1, {"params": state.params})
            epochs.append(whole(frozen, state.params))
            params = with_lora(frozen, state.params)
            metrics["val_loss"] = validation_loss(params)
            if setting.judge is not None:
                completions = make_sampler(setting, params, seed)(setting.heldout, len(epochs))
                metrics["utility"] = setting.judge(setting.heldout, completions).mean()
        evaluated = "val_loss" in metrics
        if step % 20 == 0 or evaluated:
            run.log("sft", step + 1, metrics | {"skipped": step + 1 - int(state.step)})
        if save_due(cfg, run, step + 1, evaluated=evaluated):
            run.save(
                "sft", step + 1, state, keep=cfg.keep, metric=-metrics["val_loss"] if evaluated else None,
                data_state=None if batches is None else data_state(batches),
            )  # fmt: skip
    if setting.streaming and setting.rejects is not None:
        for line in setting.rejects.summary():
            run.say(line)
    return epochs


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains; returns the final metrics."""
    setting = load_setting(cfg)
    with Run(cfg.run_dir, cfg, name="sft", resume=cfg.resume) as run:
        announce(setting, run)
        params = train(cfg, setting, run, cfg.seed)[-1]
        metrics = dict(setting.facts)
        if setting.judge is not None:
            completions = make_sampler(setting, params, cfg.seed)(setting.heldout, 0)
            metrics["sft_utility"] = float(setting.judge(setting.heldout, completions).mean())
        run.summary(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
