"""Reinforcement learning without a critic: groups of answers to each prompt, scored and compared with each other.

The parts that GRPO and its kin share. An algorithm is an `Algorithm`: how scores become advantages, what is maximised,
and what a step averages over. An iteration is rollout → score → advantages → update in epochs of minibatches; the loop
is in `group_loop.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rlhf_jax.adapters import over_trunk
from rlhf_jax.batches import Completions, Ended, Prompts, Tokens
from rlhf_jax.data.tokens import join
from rlhf_jax.diagnostics import sampler_gap
from rlhf_jax.kl import kl_k1
from rlhf_jax.loop import shard_microbatches
from rlhf_jax.masking import masked_mean, masked_sum
from rlhf_jax.models import Transformer
from rlhf_jax.rewards.reward import (
    HostScores,
    Reward,
    weighted_sum,
    weights_of,
)
from rlhf_jax.sampling import generate
from rlhf_jax.sampling.ends import EosId
from rlhf_jax.sampling.queue import generate_queued
from rlhf_jax.scored_groups import Scored
from rlhf_jax.scoring import in_parts, response_logprobs, token_scores
from rlhf_jax.sharding import current_mesh, shard_batch, to_host
from rlhf_jax.train import make_train_step, ppo_update
from rlhf_jax.types import Metrics, Params


class Answers(NamedTuple):
    """Answers with all that an update needs of them."""

    tokens: Tokens
    old_logprobs: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"] | None
    """None where the loss has no KL."""
    sampler_logprobs: Float[Array, "B T"]
    """The sampler's own ones; it may compute in another precision than the trainer."""
    advantages: Float[Array, " B"]


class Algorithm(NamedTuple):
    """The parts in which algorithms of this family differ."""

    advantages: Callable[[Float[Array, " B"]], Float[Array, " B"]]
    """advantages(scores), prompt-major: the answers to a prompt stand together."""
    loss: Callable[[Float[Array, "B T"], Answers], tuple[Float[Array, ""], Metrics]]
    """loss(logprobs, answers) -> (loss, metrics); one of `rlhf_jax.losses.grpo`."""
    averaged: Callable[[Bool[Array, "B T"]], Int[Array, ""]]
    """averaged(mask): how many rows, tokens … the loss is a mean over. A microbatch weighs as many."""
    metrics_averaged: Callable[[Bool[Array, "B T"]], Int[Array, ""]] = jnp.sum
    """The same of the loss's metrics; by default tokens."""
    kl_in_loss: bool = False
    """Whether the loss reads the reference."""
    kl_in_reward: float = 0.0
    """β: the score of an answer is r − β log(π/π_ref) (k₁, summed over its tokens)."""
    penalty: Callable[[Int[Array, " B"]], Float[Array, " B"]] | None = None
    """penalty(lengths in tokens), which is added to the scores."""
    rounds: int = 1
    """The most times that prompts are drawn until there are enough groups with a signal (DAPO's dynamic sampling).
    With more than one, a group without a signal that is taken even so has the advantages 0."""


class Numbers(NamedTuple):
    """The sizes of an iteration."""

    prompts: int
    """Groups."""
    group_size: int
    """Answers to each prompt."""
    epochs: int
    minibatches: int
    accumulate: int
    temperature: float
    max_new_tokens: int
    slots: int
    """Answers that are sampled at once: a multiple of the group size. On a mesh all are."""


class Frozen(NamedTuple):
    """The arrays that training only reads."""

    reference: Params
    """{} where it is the trunk."""
    rewards: dict[str, Params]
    trunk: Params

    def over_trunk(self, own: Params) -> Params:
        """A role's parameters."""
        return over_trunk(self.trunk, own)


# 1. Rollout and score.


def rollout(
    model: Transformer,
    numbers: Numbers,
    policy: TrainState,
    frozen: Frozen,
    prompts: Prompts,
    key: PRNGKeyArray,
    *,
    eos_id: EosId,
    pad_id: int,
    put: Callable[[Ended], None] | None = None,
) -> Completions:
    """`group_size` answers to each prompt, prompt-major. Without a mesh a queue fills slots that have ended.

    `put` is given the answers of the queue as they end.
    """
    params, size = frozen.over_trunk(policy.params), numbers.group_size
    if current_mesh() is None:
        return generate_queued(
            model, params, prompts.tokens, prompts.mask, key, group_size=size, slots=numbers.slots,
            max_new_tokens=numbers.max_new_tokens, temperature=numbers.temperature, eos_id=eos_id, pad_id=pad_id,
            put=put,
        )  # fmt: skip
    repeated = shard_batch(jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), prompts))
    return generate(
        model, params, repeated.tokens, repeated.mask, key, max_new_tokens=numbers.max_new_tokens,
        temperature=numbers.temperature, eos_id=eos_id, pad_id=pad_id,
    )  # fmt: skip


def score(
    rewards: Sequence[Reward],
    on_tokens: Callable[[dict[str, Params], Tokens], dict[str, Array]],
    frozen: Frozen,
    prompts: Prompts,
    completions: Completions,
    found: Mapping[str, HostScores],
    *,
    pad_id: int,
) -> Scored:
    """The weighted sum of all rewards of each answer. `found` are the findings of the host rewards."""
    models = {name: frozen.over_trunk(own) for name, own in frozen.rewards.items()}
    each: dict[str, Any] = {name: np.float32(some.scores) for name, some in found.items()}
    if models:
        each |= to_host(on_tokens(models, shard_batch(join(prompts, completions, pad_id=pad_id))))
    return Scored(prompts, completions, np.asarray(weighted_sum(each, weights_of(rewards))), each, found)


# 2. Advantages, and what the update needs.


def shape(
    algorithm: Algorithm,
    model: Transformer,
    numbers: Numbers,
    policy: TrainState,
    frozen: Frozen,
    tokens: Tokens,
    completions: Completions,
    scores: Float[Array, " B"],
    signal: Bool[Array, " B"],
) -> tuple[Answers, Metrics]:
    """Advantages of answers, and log-probabilities before the update.

    An answer without a `signal` has the advantage 0: nothing is to be learned from its group.
    """
    mask, parts = tokens.mask, numbers.minibatches * numbers.accumulate  # as many rows at once as in training
    scores_of = partial(token_scores, model, frozen.over_trunk(policy.params), temperature=numbers.temperature)
    old_logprobs, entropy = in_parts(scores_of, tokens, parts)
    metrics = {"entropy": masked_mean(entropy, mask), "length": mask.sum(axis=1).mean(dtype=jnp.float32)}
    ref_logprobs = None
    if algorithm.kl_in_loss or algorithm.kl_in_reward:
        reference = frozen.over_trunk(frozen.reference)
        logprobs_of = partial(response_logprobs, model, reference, temperature=numbers.temperature)
        ref_logprobs = in_parts(logprobs_of, tokens, parts)
        kl = masked_sum(kl_k1(old_logprobs, ref_logprobs), mask, axis=1)
        metrics["kl_k1"] = kl.mean()
        scores -= algorithm.kl_in_reward * kl
    if algorithm.penalty is not None:
        taken = algorithm.penalty(completions.mask.sum(axis=1))
        metrics["penalty"] = taken.mean()
        scores += taken
    start, count = mask.shape[1] - completions.tokens.shape[1] - 1, completions.tokens.shape[1]
    sampled = jnp.zeros(mask.shape, jnp.float32).at[:, start : start + count].set(completions.logprobs)
    metrics |= sampler_gap(completions, old_logprobs[:, start : start + count])
    advantages = jnp.where(signal, algorithm.advantages(scores), 0.0)
    return Answers(tokens, old_logprobs, ref_logprobs, sampled, advantages), metrics


# 3. Update.


def update(
    algorithm: Algorithm,
    model: Transformer,
    numbers: Numbers,
    policy: TrainState,
    frozen: Frozen,
    answers: Answers,
    key: PRNGKeyArray,
) -> tuple[TrainState, Metrics]:
    """The policy after `epochs` × `minibatches` steps."""

    def loss(trainable: Params, batch: Answers, frozen: Frozen) -> tuple[Array, Metrics]:
        logprobs = response_logprobs(
            model, frozen.over_trunk(trainable), batch.tokens, temperature=numbers.temperature
        )
        return algorithm.loss(logprobs, batch)

    def averaged(batch: Answers) -> dict[str, Array]:
        mask = batch.tokens.mask
        return {"loss": algorithm.averaged(mask), "metrics": algorithm.metrics_averaged(mask)}

    train_step = make_train_step(loss, counts=averaged if numbers.accumulate > 1 else None)

    def step(policy: TrainState, batch: tuple[Answers, None]) -> tuple[TrainState, Metrics]:
        return train_step(policy, shard_microbatches(batch[0], numbers.accumulate), frozen)

    policy, metrics = ppo_update(
        step, policy, answers, None, key, epochs=numbers.epochs, minibatches=numbers.minibatches
    )
    return policy, {name: x.sum() if name.endswith("skipped") else x.mean() for name, x in metrics.items()}


def learn(
    algorithm: Algorithm,
    model: Transformer,
    numbers: Numbers,
    pad_id: int,
    policy: TrainState,
    frozen: Frozen,
    prompts: Prompts,
    completions: Completions,
    scores: Float[Array, " B"],
    signal: Bool[Array, " B"],
    key: PRNGKeyArray,
) -> tuple[TrainState, Metrics]:
    """Everything after the scores; pure."""
    tokens = join(prompts, completions, pad_id=pad_id)
    answers, metrics = shape(algorithm, model, numbers, policy, frozen, tokens, completions, scores, signal)
    policy, updated = update(algorithm, model, numbers, policy, frozen, answers, key)
    return policy, metrics | updated
