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
from rlhf_jax.models.fused import attention_kernel
from rlhf_jax.rewards.reward import (
    HostScores,
    Reward,
    weighted_sum,
    weights_of,
)
from rlhf_jax.sampling import generate
from rlhf_jax.sampling.ends import EosId
from rlhf_jax.sampling.layout import sampling_copies
from rlhf_jax.sampling.queue import generate_queued, slots_of_copy
from rlhf_jax.scored_groups import Scored
from rlhf_jax.scoring import Joined, in_parts, response_logprobs, token_scores
from rlhf_jax.sharding import current_mesh, shard_batch, to_host
from rlhf_jax.train import make_train_step, ppo_update
from rlhf_jax.types import Metrics, Params


class Answers(NamedTuple):
    """Answers with all that an update needs of them."""

    tokens: Tokens
    old_logprobs: Float[Array, "B T"]
    """The policy's before the update. `shape` leaves them NaN where `update` finds them itself."""
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
    """Answers that are sampled at once: a multiple of the group size. On a mesh see `sampled_at_once`."""

    @property
    def updates_once(self) -> bool:
        """Whether all answers are learned from in a single step."""
        return self.epochs * self.minibatches == 1


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
    """`group_size` answers to each prompt, prompt-major. A queue refills the slots of answers that have ended.

    Where the mesh's copies of the weights do not divide the prompts, all answers are sampled at once. `put` is given
    the answers of the queue as they end; it is for one copy.
    """
    params, size = frozen.over_trunk(policy.params), numbers.group_size
    if len(prompts.row) % sampling_copies(model.config, params) == 0:
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


def sampled_at_once(numbers: Numbers, copies: int) -> int:
    """The answers that `rollout` samples at once on so many copies of the weights: all without a queue."""
    if numbers.prompts % copies:
        return numbers.prompts * numbers.group_size
    return copies * slots_of_copy(numbers.slots, numbers.prompts, numbers.group_size, copies)


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


def joined(model: Transformer, numbers: Numbers, tokens: Tokens, *, shuffled: bool = False) -> Joined:
    """How answers were joined with their prompts: whether a group's prompt is read once for all of its answers.

    That needs whole groups, one after the other. Rows are read alone where minibatches are shuffled, where a group is
    cut by microbatches, on a mesh, whose devices have rows of their own, and by a fused attention kernel, which reads
    no cache.
    """
    rows, length = tokens.inputs.shape
    groups = not shuffled and rows % numbers.group_size == 0 and current_mesh() is None
    once = groups and attention_kernel(model.config, length) == "reference"
    return Joined(length - numbers.max_new_tokens, numbers.group_size if once else 1)


def forward(
    function: Callable[..., Any],
    model: Transformer,
    numbers: Numbers,
    params: Params,
    tokens: Tokens,
    *,
    shuffled: bool = False,
) -> Any:
    """`token_scores` or `response_logprobs` of answers, at the temperature that they were sampled at."""
    known = joined(model, numbers, tokens, shuffled=shuffled)
    return function(model, params, tokens, temperature=numbers.temperature, joined=known)


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
) -> tuple[Answers, Float[Array, "B T"] | None, Metrics]:
    """Advantages of answers, log-probabilities before the update, and the policy's entropy, with metrics.

    An answer without a `signal` has the advantage 0: nothing is to be learned from its group.
    With a single update the policy's log-probabilities before it are those within it. They are then left to it, and so
    is the entropy, unless the score needs them.
    """
    mask, parts = tokens.mask, numbers.minibatches * numbers.accumulate  # as many rows at once as in training
    metrics: Metrics = {"length": mask.sum(axis=1).mean(dtype=jnp.float32)}
    old_logprobs, entropy, ref_logprobs = jnp.full(mask.shape, jnp.nan), None, None
    if algorithm.kl_in_reward or not numbers.updates_once:
        scores_of = partial(forward, token_scores, model, numbers, frozen.over_trunk(policy.params))
        old_logprobs, entropy = in_parts(scores_of, tokens, parts)
    if algorithm.kl_in_loss or algorithm.kl_in_reward:
        logprobs_of = partial(forward, response_logprobs, model, numbers, frozen.over_trunk(frozen.reference))
        ref_logprobs = in_parts(logprobs_of, tokens, parts)
        if algorithm.kl_in_reward:
            scores -= algorithm.kl_in_reward * masked_sum(kl_k1(old_logprobs, ref_logprobs), mask, axis=1)
    if algorithm.penalty is not None:
        taken = algorithm.penalty(completions.mask.sum(axis=1))
        metrics["penalty"] = taken.mean()
        scores += taken
    sampled = jnp.zeros(mask.shape, jnp.float32).at[:, answer_columns(completions)].set(completions.logprobs)
    advantages = jnp.where(signal, algorithm.advantages(scores), 0.0)
    return Answers(tokens, old_logprobs, ref_logprobs, sampled, advantages), entropy, metrics


def answer_columns(completions: Completions) -> slice:
    """The columns of `join`ed tokens whose targets are the answers."""
    return slice(-completions.tokens.shape[1] - 1, -1)


def policy_metrics(answers: Answers, entropy: Float[Array, "B T"], completions: Completions) -> Metrics:
    """Metrics of the policy before its update, whose log-probabilities are known."""
    mask = answers.tokens.mask
    metrics = {"entropy": masked_mean(entropy, mask)}
    if answers.ref_logprobs is not None:
        metrics["kl_k1"] = masked_sum(kl_k1(answers.old_logprobs, answers.ref_logprobs), mask, axis=1).mean()
    return metrics | sampler_gap(completions, answers.old_logprobs[:, answer_columns(completions)])


# 3. Update.

OLD_LOGPROBS, ENTROPY = "before/logprobs", "before/entropy"
"""The policy's before the update, [B, T], found in a single one: metrics for as long as it runs."""


def update(
    algorithm: Algorithm,
    model: Transformer,
    numbers: Numbers,
    policy: TrainState,
    frozen: Frozen,
    answers: Answers,
    entropy: Float[Array, "B T"] | None,
    key: PRNGKeyArray,
) -> tuple[TrainState, Answers, Float[Array, "B T"], Metrics]:
    """The policy after `epochs` × `minibatches` steps, with the log-probabilities and entropy before them.

    These are found in the single step where the entropy is None.
    """
    within = entropy is None

    def loss(trainable: Params, batch: Answers, frozen: Frozen) -> tuple[Array, Metrics]:
        function = token_scores if within else response_logprobs
        shuffled = numbers.minibatches > 1
        found = forward(function, model, numbers, frozen.over_trunk(trainable), batch.tokens, shuffled=shuffled)
        if not within:
            return algorithm.loss(found, batch)
        logprobs, entropy = found
        old_logprobs = jax.lax.stop_gradient(logprobs)
        value, metrics = algorithm.loss(logprobs, batch._replace(old_logprobs=old_logprobs))
        return value, metrics | {OLD_LOGPROBS: old_logprobs, ENTROPY: entropy}

    def averaged(batch: Answers) -> dict[str, Array]:
        mask = batch.tokens.mask
        return {"loss": algorithm.averaged(mask), "metrics": algorithm.metrics_averaged(mask)}

    train_step = make_train_step(loss, counts=averaged if numbers.accumulate > 1 else None)

    def step(policy: TrainState, batch: tuple[Answers, None]) -> tuple[TrainState, Metrics]:
        return train_step(policy, shard_microbatches(batch[0], numbers.accumulate), frozen)

    policy, metrics = ppo_update(
        step, policy, answers, None, key, epochs=numbers.epochs, minibatches=numbers.minibatches
    )
    if entropy is None:
        answers, entropy = answers._replace(old_logprobs=metrics.pop(OLD_LOGPROBS)[0]), metrics.pop(ENTROPY)[0]
    metrics = {name: x.sum() if name.endswith("skipped") else x.mean() for name, x in metrics.items()}
    return policy, answers, entropy, metrics


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
    """Everything after the scores; pure. Answers may be `trimmed`: their columns are counted here."""
    numbers = numbers._replace(max_new_tokens=completions.tokens.shape[1])
    tokens = join(prompts, completions, pad_id=pad_id)
    answers, entropy, metrics = shape(algorithm, model, numbers, policy, frozen, tokens, completions, scores, signal)
    policy, answers, entropy, updated = update(algorithm, model, numbers, policy, frozen, answers, entropy, key)
    return policy, metrics | policy_metrics(answers, entropy, completions) | updated
