"""The loop of reinforcement learning without a critic: groups are sampled, scored on device or host, learned from."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from jaxtyping import Array, Int, PRNGKeyArray

from rlhf_jax.actor_critic import own_part
from rlhf_jax.batches import Completions, Ended, Prompts, Tokens
from rlhf_jax.compiled import count_compilations
from rlhf_jax.data.order import EpochOrder
from rlhf_jax.data.tokens import narrowed, take, trimmed
from rlhf_jax.drawn import DrawnPrompts
from rlhf_jax.groups import Algorithm, Frozen, Numbers, learn, rollout, sampled_at_once, score
from rlhf_jax.loop import Loop
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
)
from rlhf_jax.rewards.stream import Stream
from rlhf_jax.sampling.layout import sampling_copies
from rlhf_jax.sampling.sampler import numpy_completions
from rlhf_jax.scored_groups import Scored, all_rounds, group_metrics, has_signal, rows_with_signal
from rlhf_jax.sharding import check_rows, current_mesh, shard_batch, shard_params, to_host
from rlhf_jax.tasks.measure import as_texts
from rlhf_jax.tasks.task import Judge, PromptRow, PromptSets
from rlhf_jax.train import make_state
from rlhf_jax.types import Metrics, Params


class Programs(NamedTuple):
    """The compiled parts of an iteration; between them answers are numpy arrays."""

    sample: Callable[[TrainState, Frozen, Prompts, PRNGKeyArray], Completions]
    on_tokens: Callable[[dict[str, Params], Tokens], dict[str, Array]]
    learn: Callable[..., tuple[TrainState, Metrics]]
    stream: Stream | None
    """Where `sample` puts answers as they end, for host rewards. Not on a mesh."""


def compile_programs(
    algorithm: Algorithm, model: Transformer, numbers: Numbers, base: Pretrained, rewards: Sequence[Reward]
) -> Programs:
    """Each is compiled when it is first called."""
    host = [reward for reward in rewards if not reward.traceable]
    streams = current_mesh() is None and host and all(reward.streams for reward in host)
    stream = Stream() if streams else None
    put = None if stream is None else stream.put
    return Programs(
        jax.jit(partial(rollout, model, numbers, eos_id=base.eos_id, pad_id=base.pad_id, put=put)),
        jax.jit(partial(score_tokens, tuple(reward._replace(params=None) for reward in rewards))),
        jax.jit(partial(learn, algorithm, model, numbers, base.pad_id), donate_argnums=0),
        stream,
    )


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


def answer(
    programs: Programs,
    numbers: Numbers,
    base: Pretrained,
    draw: Callable[[int], tuple[Prompts, Sequence[PromptRow]]],
    rounds: int,
    rewards: Sequence[Reward],
    policy: TrainState,
    frozen: Frozen,
    key: PRNGKeyArray,
) -> Scored:
    """Scored groups of one round or more, until enough have a signal. draw(round) are its prompts, and their rows.

    Prompts are as wide as the longest of a round needs, in few widths.
    """
    parts: list[Scored] = []
    signals = 0
    for number in range(rounds):
        whole, rows = draw(number)
        repeated = take(whole, np.arange(numbers.prompts).repeat(numbers.group_size))
        asked, prompts = (to_host(narrowed(some)) for some in (whole, repeated))
        sample = partial(programs.sample, policy, frozen, asked, jax.random.fold_in(key, number))
        texts = partial(as_texts, base, rows)
        completions, found = sample_and_score(sample, programs.stream, rewards, texts, prompts)
        scored = score(rewards, programs.on_tokens, frozen, prompts, completions, found, pad_id=base.pad_id)
        parts.append(scored._replace(prompts=to_host(repeated)))
        signals += int(has_signal(scored.scores, numbers.group_size).sum())
        if signals >= numbers.prompts:
            break
    scored = all_rounds(parts)
    return scored._replace(prompts=narrowed(scored.prompts))


def prompt_draw(count: int, number: int, seed: Sequence[int]) -> Callable[[int], Int[np.ndarray, " P"]]:
    """draw(step): so many of `count` prompts. All come, in a new order each time, before one comes again.

    Where there are fewer than `number`, a draw has each at least once.
    """
    whole, rest = np.tile(np.arange(count), number // count), number % count
    order = EpochOrder(seed, count, rest) if rest else None
    return lambda step: whole if order is None else np.concatenate([whole, order.rows(step)])


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
    points. All prompts come before one comes again; each round of an iteration has an order of its own. Of a
    stream each round has the next ones.
    Metrics of answers are of all that were sampled, in all rounds.
    Raises UserError without any reward, and for answers that do not divide over the mesh.
    """
    check_rewards(rewards)
    answers = numbers.prompts * numbers.group_size
    check_rows(answers, "answers")
    model, key = Transformer(base.config), jax.random.key(seed + 6)
    trunk, trainable = split(base.params, jax.random.fold_in(key, 0))
    policy = make_state(model, shard_params(trainable), optimizer)
    own = {name: own_part(params, adapters) for name, params in params_of(rewards).items()}
    first = reference if reference is not None else {} if adapters else base.params
    reads = algorithm.kl_in_loss or bool(algorithm.kl_in_reward)
    frozen = shard_params(Frozen(first if reads else {}, own, trunk))
    programs = compile_programs(algorithm, model, numbers, base, rewards)
    count = len(sets.train.row)
    draws = [prompt_draw(count, numbers.prompts, [seed, number]) for number in range(algorithm.rounds)]
    warned: set[str] = set()
    policy = loop.restore(policy)
    drawn = DrawnPrompts(
        sets.train, sets.rows, lambda step, number: draws[number](step), sets.stream, numbers.prompts, seed, loop
    )
    learned = answers // numbers.minibatches // numbers.accumulate
    shape = learned, sets.train.tokens.shape[1] + numbers.max_new_tokens
    copies = sampling_copies(base.config, frozen.over_trunk(policy.params))
    at_once = sampled_at_once(numbers, copies)
    if at_once > min(numbers.slots, answers):
        loop.run.warn(
            f"--slots {numbers.slots} are not enough for {numbers.prompts} groups of {numbers.group_size} on {copies} "
            f"copies of the weights: {at_once} answers are sampled at once"
        )
    fewer = numbers.prompts % copies == 0 and at_once > copies * numbers.group_size
    flag = "--slots" if fewer else "--groups"
    loop.say_memory(
        base.config, policy.params, (policy, frozen), shape, adapters=adapters,
        sampled=(frozen.over_trunk(policy.params), at_once, flag),
    )  # fmt: skip
    with count_compilations() as compilations:
        for step in loop:
            began = time.perf_counter()
            sample_key, update_key = (jax.random.fold_in(key, 2 * step + i) for i in (1, 2))
            scored = answer(
                programs, numbers, base, partial(drawn.asked, step), algorithm.rounds, rewards, policy, frozen,
                sample_key,
            )  # fmt: skip
            for name, some in scored.found.items():
                if some.first_error and name not in warned:
                    loop.run.warn(f"reward {name}: {some.first_error}")
                    warned.add(name)
            sampled = scored.prompts, scored.completions, scored.scores
            rows, signal = np.arange(len(scored.scores)), np.ones(len(scored.scores), bool)
            if algorithm.rounds > 1:
                rows, signal = rows_with_signal(scored.scores, numbers.prompts, numbers.group_size)
            asked, completions, scores = to_host(take(sampled, rows))
            batch = shard_batch((asked, trimmed(completions), scores, signal))
            policy, trained = programs.learn(policy, frozen, *batch, update_key)
            metrics: dict[str, Any] = {**trained}
            metrics["skipped"] = int(metrics["skipped"])
            seconds = time.perf_counter() - began
            loop.watch_skipped(step, metrics["skipped"], batch)
            metrics |= group_metrics(scored, base.ended(scored.completions), numbers.group_size)
            metrics |= {
                "groups": len(scored.scores) // numbers.group_size,
                "learned_groups": int(signal.sum()) // numbers.group_size,
            }
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
            loop.end_step(
                step, policy, metrics, evaluated=evaluated, best=float(metrics["score"]), data_state=drawn.data_state
            )
    found = {f"{loop.stage}_{name}": value for name, value in loop.last_metrics().items()}
    return frozen.over_trunk(policy.params), found
