"""A Bradley-Terry reward model from human comparisons, started from the SFT weights.

Ouyang et al. 2022, eq. 1 (https://arxiv.org/abs/2203.02155): all K(K−1)/2 pairs of a prompt's K ranked answers are
one batch element; K = 2 is the plain pair. Afterwards the head's bias is moved so that demonstrations score 0 on
average. The new head is initialised with std 1/√(d+1) (Huang et al. 2024, https://arxiv.org/abs/2403.17031).
    python experiments/reward_model.py
About 4 minutes on 2 CPU cores (it runs SFT first). In the controlled world it agrees with held-out annotators about
76% of the time, where their own noise allows 80%; "pick the longer" gets 56%.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from experiments import sft
from experiments.adapters import Dropping, in_training, split
from experiments.setting import Comparisons, Setting, Source, announce, load_setting
from experiments.sft import SFT
from experiments.training import (
    SkippedSteps,
    Training,
    check_parts,
    counts_of,
    in_place,
    make_optimizer,
    parts_of,
    save_due,
)
from rlhf_jax.batches import PackedRankings, Rankings, Tokens
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.data.preferences import packed_rewards, stack_packed
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import at_least
from rlhf_jax.evaluate import calibration, length_baseline, preference_accuracy
from rlhf_jax.log import Run
from rlhf_jax.losses import ranking_loss
from rlhf_jax.losses.reward_model import ranking_counts
from rlhf_jax.models import ModelConfig, ScalarModel, from_language_model, with_lora
from rlhf_jax.scoring import response_rewards, token_values
from rlhf_jax.sharding import shard_batch, shard_params, to_host
from rlhf_jax.train import make_state, make_train_step


@dataclass(frozen=True)
class RewardModel(Dropping, Training):
    """What reward-model training can be told."""

    epochs: int = 2
    prompts_per_step: int = 16
    """Each with all of its K answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, epochs=1, prompts_per_step=1)
        check_parts(self, self.prompts_per_step, "prompts")


@dataclass(frozen=True)
class Config(RewardModel, Source):
    """A reward model from comparisons; runs SFT first."""

    sft: SFT = field(default_factory=SFT)


def pick(rankings: Rankings, prompts: np.ndarray) -> Rankings:
    """The rankings of some prompts, with their K answers each."""
    k = rankings.ranks.shape[1]
    rows = (prompts[:, None] * k + np.arange(k)).reshape(-1)
    return Rankings(take(rankings.responses, rows), rankings.ranks[prompts], rankings.mask[prompts])


def make_scorer(setting: Setting, batch_size: int = 1024):
    """score(params, tokens) -> numpy [B], in batches of one shape."""
    return in_batches(partial(response_rewards, ScalarModel(setting.model)), batch_size)


def in_batches(function: Callable[[Any, Tokens], Array], batch_size: int):
    """function(params, tokens) -> [B], compiled, as one that goes over the rows in batches of one shape."""
    compiled = jax.jit(function)

    def score(params: Any, tokens: Tokens) -> np.ndarray:
        count = len(tokens.mask)
        size = min(batch_size, count)
        starts = range(0, count, size)
        parts = [compiled(params, shard_batch(take(tokens, np.arange(s, s + size) % count))) for s in starts]
        return np.concatenate(to_host(parts))[:count]

    return score


def evaluate(score, params: Any, heldout: Rankings) -> dict[str, Any]:
    """Agreement with held-out annotators on pairs, with "pick the longer" beside it, and calibration."""
    return agreement(score(params, heldout.responses), heldout)


def agreement(scores: np.ndarray, heldout: Rankings) -> dict[str, Any]:
    """As `evaluate`, from the scores of all held-out answers."""
    scores = scores.reshape(heldout.ranks.shape)
    lengths = np.asarray(heldout.responses.mask).sum(axis=1).reshape(heldout.ranks.shape)
    rows = np.arange(len(scores))
    best, worst = heldout.ranks.argmin(axis=1), heldout.ranks.argmax(axis=1)
    accuracy, low, high = preference_accuracy(scores[rows, best], scores[rows, worst])
    # Half of the pairs turned round, so that outcomes are not all 1.
    signs = np.where(rows % 2, -1.0, 1.0)
    table = calibration(signs * (scores[rows, best] - scores[rows, worst]), signs > 0, bins=10)
    return {
        "val_accuracy": accuracy,
        "val_accuracy_low": low,
        "val_accuracy_high": high,
        "length_baseline": length_baseline(lengths[rows, best], lengths[rows, worst])[0],
        "calibration_error": table.error,
    }


def make_step(cfg: RewardModel, config: ModelConfig, dropout_key: PRNGKeyArray):
    """train_step(state, rankings, frozen, step) -> (state, metrics)."""
    model = ScalarModel(config)

    def loss_fn(own: Any, batch: Rankings | PackedRankings, frozen: Any, step: Any):
        params = in_training(cfg, frozen, own, dropout_key, step)
        if isinstance(batch, PackedRankings):
            rewards = packed_rewards(token_values(model, params, batch.tokens), batch)
        else:
            rewards = response_rewards(model, params, batch.responses).reshape(batch.ranks.shape)
        return ranking_loss(rewards, batch.ranks, batch.mask)

    return make_train_step(loss_fn, counts=counts_of(cfg, lambda batch: ranking_counts(batch.ranks, batch.mask)))


def train(
    cfg: RewardModel, setting: Setting, comparisons: Comparisons, sft_params: Any, run: Run, seed: int
) -> tuple[Any, dict[str, float]]:
    """Trains; returns the shifted parameters, adapters over the SFT's weights if asked for, and the final metrics."""
    model = ScalarModel(setting.model)
    params = from_language_model(shard_params(sft_params), jax.random.key(seed + 1), setting.model)
    prompts = len(comparisons.train.ranks)
    steps_an_epoch = max(1, prompts // cfg.prompts_per_step)
    steps = cfg.epochs * steps_an_epoch
    frozen, own = shard_params(split(cfg, jax.random.key(seed + 3), params))
    state = make_state(model, own, make_optimizer(cfg, steps))

    check_parts(cfg, min(prompts, cfg.prompts_per_step), "prompts")

    def make_batch(some: np.ndarray) -> Any:
        """What a step takes: the comparisons of some prompts."""
        if comparisons.pack is None:
            return parts_of(cfg, pick(comparisons.train, some))
        packed = [comparisons.pack(part) for part in np.split(some, cfg.accumulate)]
        return in_place(cfg, stack_packed(packed) if cfg.accumulate > 1 else packed[0])

    train_step = make_step(cfg, setting.model, jax.random.key(seed + 5))
    score = make_scorer(setting)
    state, first = run.restore("reward_model", state)
    skipped = SkippedSteps(cfg, run, "reward_model")
    for step in run.progress("reward_model", range(first, steps), show=("loss", "accuracy", "val_accuracy")):
        if step % steps_an_epoch == 0 or step == first:
            permutation = np.random.default_rng([seed, 2, step // steps_an_epoch]).permutation(prompts)
        start = step % steps_an_epoch * cfg.prompts_per_step
        batch = make_batch(permutation[start : start + cfg.prompts_per_step])
        state, metrics = train_step(state, batch, frozen, step)
        skipped.watch(step + 1, metrics["skipped"], batch)
        last = step + 1 == steps
        if (step + 1) % max(1, steps // 8) == 0 or last:
            metrics |= evaluate(score, with_lora(frozen, state.params), comparisons.heldout)
        evaluated = "val_accuracy" in metrics
        if step % 20 == 0 or evaluated:
            run.log("reward_model", step + 1, metrics | {"skipped": step + 1 - int(state.step)})
        if save_due(cfg, run, step + 1, evaluated=evaluated):
            run.save("reward_model", step + 1, state, keep=cfg.keep, metric=metrics.get("val_accuracy"))

    # Ouyang et al. 2022, §3.5: a bias so that demonstrations score 0 on average.
    params = with_lora(frozen, jax.tree.map(jnp.copy, state.params))
    params["head"]["bias"] -= score(params, setting.validation).mean()
    metrics = evaluate(score, params, comparisons.heldout) | comparisons.facts
    metrics["demonstrations_score"] = float(score(params, setting.validation).mean())
    if "ceiling" in metrics:
        metrics["share_of_ceiling"] = metrics["val_accuracy"] / metrics["ceiling"]
    return params, {f"reward_model_{k}": float(v) for k, v in metrics.items()}


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """SFT, comparisons of its answers, reward model; returns the final metrics."""
    setting = load_setting(cfg)
    with Run(cfg.run_dir, cfg, name="reward_model", resume=cfg.resume) as run:
        announce(setting, run)
        sft_params = sft.train(cfg.sft, setting, run, cfg.seed)[-1]
        comparisons = setting.compare(sft.make_sampler(setting, sft_params, cfg.seed))
        _, metrics = train(cfg, setting, comparisons, sft_params, run, cfg.seed)
        run.summary(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
