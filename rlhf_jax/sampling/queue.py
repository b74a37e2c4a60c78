"""Rollouts that do not wait for the longest answer: a row that has ended gives its slot to the next prompt in a queue.

One compiled program. Its cache is a ring: all slots write into the same column, which moves on by one each step, and a
new prompt is laid into the columns just before it. So no slot has a place of its own to write to, and nothing moves.
The prompt of a group is read once for all of its answers.

On a mesh each copy of the weights (see `layout.py`) has slots and a queue of its own, and nothing of a cache is ever
sent from one to another. They take their steps together.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import io_callback
from jaxtyping import Bool, Int, PRNGKeyArray

from rlhf_jax.axes import constrain, over_copies, sum_over_copies
from rlhf_jax.batches import Completions, Ended
from rlhf_jax.models import KVCache, Transformer, init_cache
from rlhf_jax.sampling.decoder import cache_apart, decoder_of
from rlhf_jax.sampling.draw import choose
from rlhf_jax.sampling.ends import EosId, eos_ids, is_end
from rlhf_jax.sampling.generate import check_request, is_greedy
from rlhf_jax.sampling.layout import sampling_copies, sampling_layout
from rlhf_jax.sharding import shard_batch
from rlhf_jax.types import ScalarLike

REFILL, DECODE = "queue_refill", "queue_decode"
"""The names of the two loops in a compiled program."""


def slots_of_copy(slots: int, prompts: int, group_size: int, copies: int) -> int:
    """The slots of each copy: its share, rounded up to whole groups, and no more than it has answers."""
    return min(-(-slots // copies // group_size), prompts // copies) * group_size


def read_at_once(prompts: int, groups: int) -> int:
    """How many prompts a copy reads at once, whose slots hold so many groups.

    They leave few slots idle for long, and few of them cost a pass of their own.
    """
    return max(1, min(prompts, groups // 4))


class _State(NamedTuple):
    """The slots of a copy, S of them, and what was written so far."""

    cache: KVCache
    row: Array
    """The answer that each slot writes, [S]; that after the last for a slot without one."""
    emitted: Array
    """How many tokens of it are written, [S]."""
    length: Array
    """Tokens of its prompt, [S]."""
    token: Array
    """The last one, [S]."""
    busy: Array
    asked: Array
    """Prompts that were begun."""
    written: Completions
    """[N + 1, max_new_tokens]: the last row takes what belongs to no answer."""
    steps: Array
    """Decoding steps so far."""
    refills: Array
    """Whether prompts are read next, by all copies alike, as their loops must end together."""
    goes_on: Array
    """Whether any copy has something left to do."""


def generate_queued(
    model: Transformer,
    params: Any,
    prompts: Int[Array, "P W"],
    prompt_mask: Bool[Array, "P W"],
    key: PRNGKeyArray,
    *,
    group_size: int,
    slots: int,
    max_new_tokens: int,
    temperature: ScalarLike,
    top_k: int | None = None,
    top_p: ScalarLike | None = None,
    eos_id: EosId,
    pad_id: int,
    limits: Int[Array, " N"] | None = None,
    put: Callable[[Ended], None] | None = None,
) -> Completions:
    """`group_size` answers to each of P left-padded prompts, N = P · group_size, prompt-major; `slots` at once.

    They are the tokens that `generate` gives for the prompts, each repeated `group_size` times, with the same key,
    whatever the slots. (Rounding in matrix products of other shapes can turn a draw that is decided in the last bit.)
    `limits` are the most tokens of each answer; more than `max_new_tokens` counts as that. An answer at its limit is
    cut there. `put` is given the answers that end as they do, each once, from another thread and while others are
    still sampled: it must not wait. On a mesh each copy of the weights has an equal share of the
    prompts, and of the slots, rounded up to whole groups.
    Raises ValueError as `generate` does, for slots that are not a multiple of the group size, for a P that is not a
    multiple of `layout.sampling_copies`, and for `put` where there is more than one copy.
    """
    check_request(
        model, prompts, prompt_mask, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        eos_id=eos_id, pad_id=pad_id,
    )  # fmt: skip
    number = len(prompts)
    count = number * group_size
    if group_size < 1 or slots < group_size or slots % group_size:
        raise ValueError(f"{slots} slots are not a multiple of the group size, {group_size}")
    copies = sampling_copies(model.config, params)
    if number % copies:
        raise ValueError(f"{number} prompts do not divide over the {copies} copies of the weights")
    if put is not None and copies > 1:
        raise ValueError(f"answers are put by one copy of the weights, and there are {copies}")
    greedy = is_greedy(temperature)
    most = jnp.full(count, max_new_tokens) if limits is None else jnp.minimum(jnp.asarray(limits), max_new_tokens)
    completions, _ = _generate_queued(
        model, params, prompts, prompt_mask, key, jnp.asarray(temperature, jnp.float32),
        None if top_p is None else jnp.asarray(top_p, jnp.float32), jnp.maximum(most, 1).astype(jnp.int32),
        group_size=group_size, slots=slots, max_new_tokens=max_new_tokens, greedy=greedy, top_k=top_k,
        eos_id=eos_ids(eos_id), pad_id=pad_id, put=put,
    )  # fmt: skip
    return completions


@partial(
    jax.jit,
    static_argnames=("model", "group_size", "slots", "max_new_tokens", "greedy", "top_k", "eos_id", "pad_id", "put"),
)
def _generate_queued(
    model: Transformer,
    params: Any,
    prompts: Array,
    prompt_mask: Array,
    key: PRNGKeyArray,
    temperature: Array,
    top_p: Array | None,
    limits: Array,
    *,
    group_size: int,
    slots: int,
    max_new_tokens: int,
    **numbers: Any,
) -> tuple[Completions, Array]:
    """Completions, and how many decoding steps were run."""
    number, copies = len(prompts), sampling_copies(model.config, params)
    # The numbers that `generate` draws for N rows: one a step and row.
    uniform = jax.vmap(lambda step: jax.random.uniform(jax.random.fold_in(key, step), (number * group_size,)))(
        jnp.arange(max_new_tokens)
    )
    with sampling_layout(model.config, params) as placed:
        run = partial(
            _sample, model, placed, temperature, top_p, group_size=group_size, max_new_tokens=max_new_tokens,
            slots=slots_of_copy(slots, number, group_size, copies), **numbers,
        )  # fmt: skip
        completions, steps = over_copies(run, (prompts, prompt_mask, limits, uniform), (0, 0, 0, 1), copies)
    return shard_batch(completions), steps


def _sample(
    model: Transformer,
    params: Any,
    temperature: Array,
    top_p: Array | None,
    prompts: Array,
    prompt_mask: Array,
    limits: Array,
    uniform: Array,
    *,
    group_size: int,
    slots: int,
    max_new_tokens: int,
    greedy: bool,
    top_k: int | None,
    eos_id: tuple[int, ...],
    pad_id: int,
    put: Callable[[Ended], None] | None = None,
) -> tuple[Completions, Array]:
    """The answers of one copy of the weights to prompts of its own; `uniform` are the numbers that they draw by."""
    number, width = prompts.shape
    count, ring = number * group_size, width + max_new_tokens
    decoder, apart = decoder_of(model, params)
    at_once = read_at_once(number, slots // group_size)
    lengths = prompt_mask.sum(axis=1).astype(jnp.int32)
    limits = jnp.append(limits, max_new_tokens)

    def sample(hidden: Array, row: Array, step: Array) -> tuple[Array, Array]:
        """A token for each row of hidden states, and its log-probability."""
        # Each device of a copy draws for rows of its own, as in `generate`.
        logits = constrain(model.apply({"params": params}, hidden[:, None], method="logits")[:, 0], "row")
        drawn = None if greedy else uniform[step, jnp.minimum(row, count - 1)]
        token, logprob = choose(logits, drawn, temperature=temperature, top_k=top_k, top_p=top_p)
        return constrain(token, "batch"), constrain(logprob, "batch")

    def write(written: Completions, row: Array, step: Array, token: Array, logprob: Array) -> Completions:
        return Completions(
            written.tokens.at[row, step].set(token),
            written.mask.at[row, step].set(row < count),
            written.logprobs.at[row, step].set(logprob),
        )

    def goes_on(row: Array, emitted: Array, token: Array) -> Array:
        return (row < count) & ~is_end(token, eos_id) & (emitted < limits[row])

    def tell(row: Array, busy: Array, written: Completions) -> None:
        """Puts the answers among `row` that have just ended."""
        if put is None:
            return
        ended = (row < count) & ~busy
        some = row, ended, written.tokens[row], written.mask[row]
        jax.lax.cond(ended.any(), lambda: io_callback(partial(_put, put), None, *some), lambda: None)

    def free(state: _State) -> Array:
        return slots - state.busy.sum()

    def agreed(state: _State) -> _State:
        """Prompts are read where copies with some left have room, on average, for as many as one reads at once.

        Where a copy has fewer than four groups, a quarter of its slots is enough on average. So one copy does not wait
        until all are idle. Where all are, there is room.
        """
        left, groups = number - state.asked, slots // group_size
        room = jnp.minimum(free(state) // group_size, left)
        wanted = jnp.minimum(4 * jnp.minimum(at_once, left), groups)
        numbers = jnp.stack([room, wanted, left > 0, state.busy.any()]).astype(jnp.int32)
        room, wanted, waiting, busy = sum_over_copies(numbers)
        return state._replace(refills=(room > 0) & (4 * room >= wanted), goes_on=waiting + busy > 0)

    def refill(state: _State) -> _State:
        """The next prompts in slots that are free, as many as fit, each with its first token."""
        chosen = state.asked + jnp.arange(at_once)
        real = (chosen < number) & (jnp.arange(at_once) < free(state) // group_size)
        chosen = jnp.minimum(chosen, number - 1)
        mask, cache = prompt_mask[chosen], init_cache(model.config, at_once, width)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        hidden, cache = model.apply(
            {"params": params}, prompts[chosen], positions, mask.astype(jnp.int32), cache, method="decode"
        )
        filled = jnp.repeat(real, group_size)
        row = (chosen[:, None] * group_size + jnp.arange(group_size)[None]).reshape(-1)
        row = jnp.where(filled, row, count)
        # What is written to the slot after the last is dropped.
        slot = jnp.where(filled, jnp.argsort(state.busy, stable=True)[: at_once * group_size], slots)
        # Each device of a copy has all of these numbers, though it draws for rows of its own.
        row, slot = constrain(row, "batch"), constrain(slot, "batch")
        zero = jnp.zeros_like(row)
        token, logprob = sample(jnp.repeat(hidden[:, -1], group_size, axis=0), row, zero)
        busy, written = goes_on(row, zero + 1, token), write(state.written, row, zero, token, logprob)
        tell(row, busy, written)
        state = state._replace(
            cache=_laid(state.cache, cache_apart(cache, decoder), slot, group_size, ring),
            row=state.row.at[slot].set(row, mode="drop"),
            emitted=state.emitted.at[slot].set(1, mode="drop"),
            length=state.length.at[slot].set(jnp.repeat(lengths[chosen], group_size), mode="drop"),
            token=state.token.at[slot].set(token, mode="drop"),
            busy=state.busy.at[slot].set(busy, mode="drop"),
            asked=state.asked + real.sum(dtype=jnp.int32),
            written=written,
        )
        return agreed(state)

    def decode(state: _State) -> _State:
        """One more token in every slot; those that are free write to no answer."""
        positions = constrain((state.length + state.emitted - 1)[:, None], "batch")
        hidden, cache = decoder.apply(
            {"params": apart}, state.token[:, None], positions, jnp.ones((slots, 1), jnp.int32), state.cache, True,
            method="decode",
        )  # fmt: skip
        row = constrain(jnp.where(state.busy, state.row, count), "batch")
        step = constrain(jnp.minimum(state.emitted, max_new_tokens - 1), "batch")
        token, logprob = sample(hidden[:, -1], row, step)
        busy, written = goes_on(row, state.emitted + 1, token), write(state.written, row, step, token, logprob)
        tell(row, busy, written)
        emitted, steps = state.emitted + 1, state.steps + 1
        return agreed(
            state._replace(cache=cache, emitted=emitted, token=token, busy=busy, written=written, steps=steps)
        )

    def turn(state: _State) -> _State:
        with jax.named_scope(REFILL):
            state = jax.lax.while_loop(lambda s: s.refills, refill, state)
        with jax.named_scope(DECODE):
            return jax.lax.while_loop(lambda s: s.goes_on & ~s.refills, decode, state)

    shape, nothing = (count + 1, max_new_tokens), jnp.zeros(slots, jnp.int32)
    empty = Completions(jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))
    none, false = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    start = _State(
        init_cache(decoder.config, slots, ring), jnp.full(slots, count), nothing, nothing, nothing,
        jnp.zeros(slots, bool), none, empty, none, false, false,
    )  # fmt: skip
    state = jax.lax.while_loop(lambda s: s.goes_on, turn, agreed(start))
    return jax.tree.map(lambda x: x[:count], state.written), state.steps


def _put(put: Callable[[Ended], None], rows: Array, ended: Array, tokens: Array, mask: Array) -> None:
    which = np.asarray(ended)
    put(Ended(*(np.asarray(x)[which] for x in (rows, tokens, mask))))


def _laid(ring: KVCache, read: KVCache, slot: Array, group_size: int, size: int) -> KVCache:
    """The ring with what was read in the columns before the next one, of these slots; all else of theirs is empty."""
    width = read.segment_ids.shape[1]
    shift = ring.used % size - width

    def rows(x: Array, axis: int) -> Array:
        """[rows, …, width, …] -> [rows · group_size, …, size, …], turned to where the ring is."""
        x = jnp.repeat(x, group_size, axis=x.ndim - 4 if x.ndim > 3 else 0)
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, size - width)
        return jnp.roll(jnp.pad(x, pad), shift, axis=axis)

    def layer(old: Array, new: Array) -> Array:  # [B, H, S, K], or [L, B, H, S, K] where layers are stacked
        turned = rows(new, new.ndim - 2)
        return old.at[slot].set(turned, mode="drop") if old.ndim == 4 else old.at[:, slot].set(turned, mode="drop")

    return KVCache(
        jax.tree.map(layer, ring.keys, read.keys),
        jax.tree.map(layer, ring.values, read.values),
        ring.segment_ids.at[slot].set(rows(read.segment_ids, 1), mode="drop"),
        ring.used,
        ring.positions.at[slot].set(rows(read.positions, 1), mode="drop"),
    )
