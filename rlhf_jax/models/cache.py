"""The keys and values of what a decoder has read, for what it reads next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from rlhf_jax.axes import constrain
from rlhf_jax.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of what was read so far: [B, H, S, K] a layer, S slots.

    A tuple of layers, so that each is updated in place; one array stacked along axis 0 under `scan_layers`.
    """

    keys: Any
    values: Any
    segment_ids: Int[Array, "B S"]
    """Document of each slot; 0 is padding or empty."""
    used: Int[Array, ""]
    """Slots filled."""
    positions: Int[Array, "B S"]
    """The position of the token in each slot, by which windows are measured."""


def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty cache for `batch` sequences of at most `slots` tokens."""
    shape = (batch, config.n_kv_heads, slots, config.head_dim)

    def empty() -> Any:
        if config.scan_layers:
            zeros = jnp.zeros((config.n_layers, *shape), config.precision.compute)
            return constrain(zeros, None, "batch", "heads")
        layers = (jnp.zeros(shape, config.precision.compute) for _ in range(config.n_layers))
        return tuple(constrain(zeros, "batch", "heads") for zeros in layers)

    slots_of_rows = jnp.zeros((batch, slots), jnp.int32)
    return KVCache(empty(), empty(), slots_of_rows, jnp.zeros((), jnp.int32), jnp.zeros_like(slots_of_rows))


def repeated_cache(cache: KVCache, times: int, more: int) -> KVCache:
    """A cache with each sequence `times` in a row, and room for so many more tokens."""

    def larger(x: Array, rows: int, slots: int) -> Array:
        pad = [(0, more if axis == slots else 0) for axis in range(x.ndim)]
        return jnp.pad(jnp.repeat(x, times, axis=rows), pad)

    def layers(x: Array) -> Array:
        return larger(x, x.ndim - 4, x.ndim - 2)

    return KVCache(
        jax.tree.map(layers, cache.keys),
        jax.tree.map(layers, cache.values),
        larger(cache.segment_ids, 0, 1),
        cache.used,
        larger(cache.positions, 0, 1),
    )
