"""Reinforcement learning without a critic: groups of answers to each prompt, scored and compared with each other.

The loop that GRPO and its kin share. An algorithm is an `Algorithm`: how scores become advantages, what is maximised,
and what a step averages over. An iteration is rollout → score → advantages → update in epochs of minibatches.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rlhf_jax.actor_critic import own_part
from rlhf_jax.adapters import over_trunk
from rlhf_jax.batches import Completions, Ended, Prompts, Tokens
from rlhf_jax.data.tokens import join, take
from rlhf_jax.diagnostics import sampler_gap
from rlhf_jax.kl import kl_k1
from rlhf_jax.log import count_compilations
from rlhf_jax.loop import Loop, shard_microbatches
from rlhf_jax.masking import masked_mean, masked_sum
from rlhf_jax.models import Transformer
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.reward import (
    HostScores,
    Part,
    Reward,
    check_rewards,
    joined,
    params_of,
    score_texts,
    score_tokens,
    weighted_sum,
    weights_of,
)
from rlhf_jax.rewards.stream import Stream
from rlhf_jax.sampling import generate
from rlhf_jax.sampling.ends import EosId
from rlhf_jax.sampling.queue import generate_queued
from rlhf_jax.sampling.sampler import numpy_completions
from rlhf_jax.scored_groups import Scored, group_metrics, has_signal, with_signal
from rlhf_jax.scoring import in_parts, response_logprobs, token_scores
from rlhf_jax.sharding import check_rows, current_mesh, shard_batch, shard_params, to_host
from rlhf_jax.tasks.measure import as_texts
from rlhf_jax.tasks.task import Judge, PromptSets
from rlhf_jax.train import make_state, make_train_step, ppo_update
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
    """averaged(mask): the number of things that the loss is a mean over, which weighs its microbatches."""
    kl_in_loss: bool = False
    """Whether the loss reads the reference."""
    kl_in_reward: float = 0.0
    """β: the score of an answer is r − β log(π/π_ref) (k₁, summed over its tokens)."""
    penalty: Callable[[Int[Array, " B"]], Float[Array, " B"]] | None = None
    """penalty(lengths in tokens), which is added to the scores."""
    rounds: int = 1
    """So many times prompts are drawn until every group has a signal (DAPO's dynamic sampling); 1: once."""


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


def sample_and_score(
    sample: Callable[[], Completions],
    stream: Stream | None,
    rewards: Sequence[Reward],
    texts: Callable[[Prompts, Completions], tuple[Any, Any, Any]],
    prompts: Prompts,
) -> tuple[Completions, dict[str, HostScores]]:
    """Samples by sample(); returns the answers as numpy arrays, and the findings of the host rewards.

    With a `stream`, which sample() fills, they read answers while others are sampled. `texts(prompts, completions)`
    are their arguments; `prompts` has a row for each answer.
    """
    if stream is None:
        completions = to_host(sample())
        host = any(not reward.traceable for reward in rewards)
        return completions, score_texts(rewards, *texts(prompts, completions)) if host else {}

    def score_part(part: Part, ended: Ended) -> dict[str, HostScores]:
        answers = numpy_completions(ended.tokens, ended.mask, np.zeros(ended.mask.shape, np.float32))
        return score_texts(rewards, *texts(take(prompts, part.rows), answers), part)

    with stream.scored(score_part, len(prompts.row)) as future:
        completions = to_host(sample())
    parts, found = zip(*future.result(), strict=True)
    host_rewards = [reward for reward in rewards if not reward.traceable]
    return completions, {
        reward.name: joined(reward, parts, [some[reward.name] for some in found]) for reward in host_rewards
    }


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
) -> tuple[Answers, Metrics]:
    """Advantages of answers, and log-probabilities before the update."""
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
    return Answers(tokens, old_logprobs, ref_logprobs, sampled, algorithm.advantages(scores)), metrics


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
        return {"loss": algorithm.averaged(batch.tokens.mask)}

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
    key: PRNGKeyArray,
) -> tuple[TrainState, Metrics]:
    """Everything after the scores; pure."""
    tokens = join(prompts, completions, pad_id=pad_id)
    answers, metrics = shape(algorithm, model, numbers, policy, frozen, tokens, completions, scores)
    policy, updated = update(algorithm, model, numbers, policy, frozen, answers, key)
    return policy, metrics | updated


# The loop.


def train_groups(
    algorithm: Algorithm,
    numbers: Numbers,
    base: Pretrained,
    sets: PromptSets,
    rewards: Sequence[Reward],
    loop: Loop,
    seed: int,
    *,
    split: Callable[[Params, PRNGKeyArray], tuple[Params, Params]],
    adapters: bool,
    optimizer: optax.GradientTransformation,
    evaluations: int,
    reference: Params | None = None,
    judge: Judge | None = None,
    watch: Callable[[Params, int], dict[str, Any]] | None = None,
) -> tuple[Params, dict[str, float]]:
    """Trains `base`; returns the policy's parameters, adapters unmerged, and the last iteration's metrics.

    `split(params, key)` returns (frozen, trainable); `adapters` says that the trainable ones are adapters over the
    frozen ones. `reference` is by default the policy at the start. `watch(policy, number)` measures at `evaluations`
    points. Every iteration draws its prompts without repeating one, as far as there are enough.
    Raises UserError without any reward, and for rows that do not divide into minibatches and over the mesh.
    """
    check_rewards(rewards)
    check_rows(numbers.prompts * numbers.group_size, "answers")
    model, key = Transformer(base.config), jax.random.key(seed + 6)
    trunk, trainable = split(base.params, jax.random.fold_in(key, 0))
    policy = make_state(model, shard_params(trainable), optimizer)
    own = {name: own_part(params, adapters) for name, params in params_of(rewards).items()}
    first = reference if reference is not None else {} if adapters else base.params
    reads = algorithm.kl_in_loss or bool(algorithm.kl_in_reward)
    frozen = shard_params(Frozen(first if reads else {}, own, trunk))
    stream = Stream() if current_mesh() is None and not all(reward.traceable for reward in rewards) else None
    put = None if stream is None else stream.put
    sample = jax.jit(partial(rollout, model, numbers, eos_id=base.eos_id, pad_id=base.pad_id, put=put))
    learn_fn = jax.jit(partial(learn, algorithm, model, numbers, base.pad_id), donate_argnums=0)
    on_tokens = jax.jit(partial(score_tokens, tuple(reward._replace(params=None) for reward in rewards)))
    warned: set[str] = set()

    def answer(step: int) -> tuple[Scored, int]:
        """Scored groups, and how many groups were sampled for them."""
        parts: list[Scored] = []
        signals = 0
        for number in range(algorithm.rounds):
            rows = draw_rows(len(sets.train.row), numbers.prompts, [seed, step, number])
            sample_key = jax.random.fold_in(jax.random.fold_in(key, 2 * step + 1), number)
            asked, prompts = (to_host(take(sets.train, some)) for some in (rows, rows.repeat(numbers.group_size)))
            ask = partial(sample, policy, frozen, asked, sample_key)
            completions, found = sample_and_score(ask, stream, rewards, partial(as_texts, base, sets.rows), prompts)
            some = score(rewards, on_tokens, frozen, prompts, completions, found, pad_id=base.pad_id)
            parts.append(some)
            signals += int(has_signal(parts[-1].scores, numbers.group_size).sum())
            if signals >= numbers.prompts:
                break
        whole = parts[0] if len(parts) == 1 else with_signal(parts, numbers.prompts, numbers.group_size)
        return whole, len(parts) * numbers.prompts

    updates = numbers.epochs * numbers.minibatches
    policy = loop.restore(policy)
    with count_compilations() as compilations:
        for step in loop:
            began = time.perf_counter()
            scored, groups = answer(step)
            for name, some in scored.found.items():
                if some.first_error and name not in warned:
                    loop.run.warn(f"reward {name}: {some.first_error}")
                    warned.add(name)
            batch = shard_batch((scored.prompts, scored.completions, scored.scores))
            policy, trained = learn_fn(policy, frozen, *batch, jax.random.fold_in(key, 2 * step + 2))
            metrics: dict[str, Any] = {**trained}
            metrics["skipped"] = int(metrics["skipped"])
            seconds = time.perf_counter() - began
            loop.watch_skipped(step, metrics["skipped"], scored.completions)
            metrics |= group_metrics(scored, base.ended(scored.completions), numbers.group_size)
            metrics |= {"groups": groups, "skipped": (step + 1) * updates - int(policy.step)}
            if judge is not None:
                metrics["utility"] = judge(scored.prompts, scored.completions).mean()
            evaluated = (step + 1) % max(1, loop.steps // evaluations) == 0 or loop.is_last(step)
            if watch is not None and evaluated:
                metrics |= watch(frozen.over_trunk(policy.params), step + 1)
            metrics |= {
                "seconds": seconds,
                "tokens_per_second": int(scored.completions.mask.sum()) / seconds,
                "compilations": compilations(),
            }
            loop.end_step(step, policy, metrics, evaluated=evaluated, best=float(metrics["score"]))
    found = {f"{loop.stage}_{name}": value for name, value in loop.last_metrics().items()}
    return frozen.over_trunk(policy.params), found


def draw_rows(count: int, number: int, seed: Sequence[int]) -> Int[np.ndarray, " P"]:
    """So many of `count` rows, none twice while there are enough."""
    rng = np.random.default_rng(seed)
    whole = [rng.permutation(count) for _ in range(number // count)]
    return np.concatenate([*whole, rng.choice(count, number % count, replace=False)]).astype(int)
