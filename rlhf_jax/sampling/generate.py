"""Rollouts: prefill, then one token a step over a KV cache, in one compiled program."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int, PRNGKeyArray

from rlhf_jax.axes import constrain
from rlhf_jax.batches import Completions
from rlhf_jax.models import Transformer, init_cache
from rlhf_jax.sampling.decoder import cache_apart, decoder_of
from rlhf_jax.sampling.draw import choose
from rlhf_jax.sampling.ends import EosId, eos_ids, is_end
from rlhf_jax.sampling.layout import sampling_layout
from rlhf_jax.sharding import shard_batch
from rlhf_jax.types import ScalarLike


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "greedy", "top_k", "eos_id", "pad_id"))
def _generate(model: Transformer, params: Any, *arrays: Any, **numbers: Any) -> tuple[Completions, Array]:
    """`_sample` in the layout of sampling; what it gives lies where a batch does on the mesh that is set."""
    with sampling_layout(model.config, params) as placed:
        found = _sample(model, placed, *shard_batch(arrays), **numbers)
    return shard_batch(found)


def _sample(
    model: Transformer,
    params: Any,
    prompts: Array,
    prompt_mask: Array,
    key: PRNGKeyArray,
    temperature: Array,
    top_p: Array | None,
    streams: Array | None = None,
    *,
    max_new_tokens: int,
    greedy: bool,
    top_k: int | None,
    eos_id: tuple[int, ...],
    pad_id: int,
) -> tuple[Completions, Array]:
    """Completions, and how many decoding steps were run."""
    batch, width = prompts.shape
    keys = None if streams is None else jax.vmap(partial(stream_key, key))(streams)
    lengths = prompt_mask.sum(axis=1).astype(jnp.int32)
    decoder, apart = decoder_of(model, params)

    def next_token(hidden: Array, step: Array) -> tuple[Array, Array]:
        # On a mesh each device draws for rows of its own, so that nobody searches a vocabulary cut in parts.
        logits = constrain(model.apply({"params": params}, hidden, method="logits")[:, -1], "row")
        if greedy:
            uniform = None
        elif keys is None:
            uniform = jax.random.uniform(jax.random.fold_in(key, step), (batch,))
        else:
            uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(keys)
        tokens, chosen = choose(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)
        return constrain(tokens, "batch"), constrain(chosen, "batch")

    def read(
        model: Transformer, params: Any, tokens: Array, positions: Array, segment_ids: Array, cache: Any
    ) -> tuple[Array, Any]:
        hidden, cache = model.apply({"params": params}, tokens, positions, segment_ids, cache, method="decode")
        return hidden[:, -1:], cache

    def emit(state: tuple, hidden: Array, cache: Any) -> tuple:
        step, ended, completions, _, _ = state
        token, logprob = next_token(hidden, step)
        token = jnp.where(ended, pad_id, token)
        column = (jnp.zeros_like(step), step)
        completions = Completions(
            jax.lax.dynamic_update_slice(completions.tokens, token[:, None], column),
            jax.lax.dynamic_update_slice(completions.mask, ~ended[:, None], column),
            jax.lax.dynamic_update_slice(completions.logprobs, jnp.where(ended, 0.0, logprob)[:, None], column),
        )
        return step + 1, ended | is_end(token, eos_id), completions, token, cache

    def decode_step(state: tuple) -> tuple:
        step, _, _, token, cache = state
        last = token[:, None], (lengths + step - 1)[:, None], jnp.ones((batch, 1), jnp.int32)
        hidden, cache = read(decoder, apart, *last, cache)
        return emit(state, hidden, cache)

    shape = (batch, max_new_tokens)
    empty = Completions(jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))
    cache = init_cache(model.config, batch, width + max_new_tokens - 1)
    positions = jnp.maximum(jnp.cumsum(prompt_mask, axis=1) - 1, 0)
    hidden, cache = read(model, params, prompts, positions, prompt_mask.astype(jnp.int32), cache)
    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch,), bool),
        empty,
        jnp.zeros((batch,), jnp.int32),
        cache_apart(cache, decoder),
    )
    state = emit(start, hidden, start[-1])
    state = jax.lax.while_loop(lambda s: (s[0] < max_new_tokens) & ~s[1].all(), decode_step, state)
    return state[2], state[0]


def stream_key(key: PRNGKeyArray, stream: Int[Array, " S"]) -> PRNGKeyArray:
    """The key of a row: all of its numbers folded in, one after the other."""
    for number in stream:
        key = jax.random.fold_in(key, number)
    return key


def generate(
    model: Transformer,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    temperature: ScalarLike,
    top_k: int | None = None,
    top_p: ScalarLike | None = None,
    streams: Int[Array, "B S"] | None = None,
    eos_id: EosId,
    pad_id: int,
) -> Completions:
    """Samples completions [B, max_new_tokens] of left-padded prompts; 0 is greedy.

    A row ends with `eos_id`, or with any of several, which is part of the row; then comes `pad_id`, masked. Decoding
    ends with the last row. Log-probabilities are of the distribution sampled from: at `temperature` (at 1 when
    greedy), after top_k and top_p. With `streams` a row draws by its own numbers, in whatever batch and place it is;
    without them by its place. `temperature` and `top_p` may change without recompilation. Raises ValueError for
    prompts that are empty or not left-padded, or hold ids outside of the vocabulary, where their values are known;
    and for options that mean nothing.
    """
    check_request(
        model, prompts, prompt_mask, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        eos_id=eos_id, pad_id=pad_id,
    )  # fmt: skip
    greedy = is_greedy(temperature)
    completions, _ = _generate(
        model, params, prompts, prompt_mask, key, jnp.asarray(temperature, jnp.float32),
        None if top_p is None else jnp.asarray(top_p, jnp.float32), streams,
        max_new_tokens=max_new_tokens, greedy=greedy, top_k=top_k, eos_id=eos_ids(eos_id), pad_id=pad_id,
    )  # fmt: skip
    return completions


def is_greedy(temperature: ScalarLike) -> bool:
    """Whether a temperature is known to be 0."""
    return not isinstance(temperature, jax.core.Tracer) and float(temperature) == 0.0


def check_request(
    model: Transformer,
    prompts: Any,
    prompt_mask: Any,
    *,
    max_new_tokens: int,
    temperature: Any,
    top_k: int | None,
    top_p: Any,
    eos_id: EosId,
    pad_id: int,
) -> None:
    """Raises ValueError for prompts and options that `generate` does not take."""
    _check(max_new_tokens, temperature, top_k, top_p)
    _check_ids(model.config.vocab_size, eos_ids(eos_id), pad_id)
    _check_prompts(prompts, prompt_mask, model.config.vocab_size)


def _check(max_new_tokens: int, temperature: Any, top_k: int | None, top_p: Any) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    for name, value, least, most in [
        ("temperature", temperature, 0.0, float("inf")),
        ("top_p", top_p, 1e-6, 1.0),
    ]:
        known = value is not None and not isinstance(value, jax.core.Tracer)
        if known and not least <= float(value) <= most:
            raise ValueError(f"{name} must lie between {least:g} and {most:g}, not {float(value):g}")


def _check_ids(vocab_size: int, ends: tuple[int, ...], pad_id: int) -> None:
    """An id that the model cannot write never ends an answer; −1 says so."""
    for name, token in [*(("eos_id", end) for end in ends if end != -1), ("pad_id", pad_id)]:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} {token} is not among the model's {vocab_size} tokens")


def _check_prompts(prompts: Any, prompt_mask: Any, vocab_size: int) -> None:
    # Of an array that lies on several hosts a part is not here.
    for array in (prompts, prompt_mask):
        if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
            return
    tokens, mask = np.asarray(prompts), np.asarray(prompt_mask, bool)
    bad = np.flatnonzero(~mask[:, -1:].any(axis=1) | (mask[:, :-1] & ~mask[:, 1:]).any(axis=1))
    if len(bad):
        raise ValueError(f"prompt {bad[0]} is empty or not left-padded: its mask must end in True")
    outside = np.argwhere(mask & ((tokens < 0) | (tokens >= vocab_size)))
    if len(outside):
        row, column = outside[0]
        raise ValueError(f"prompt {row} has the id {tokens[row, column]}, and the model has {vocab_size} tokens")
