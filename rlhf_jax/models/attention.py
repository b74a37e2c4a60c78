"""Attention over keys and values that may lie in a cache, and what differs from layer to layer."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Int

from rlhf_jax.axes import constrain, parts
from rlhf_jax.logprobs import soft_cap
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.rope import rope_frequencies

EVERYTHING = 2**31 - 1  # A window that nothing lies outside of.
BLOCKS, LEAST_BLOCK = 4, 64


class LayerNumbers(NamedTuple):
    """Numbers that a layer has for itself, apart from parameters; stacked along axis 0, those of all layers."""

    frequencies: Float[Array, "*layers half"]
    """The frequencies of its rotary positions; zeros turn nothing."""
    window: Int[ArrayLike, "*layers"] | None


def layer_numbers(config: ModelConfig, layer: int) -> LayerNumbers:
    """Frequencies and window of one layer."""
    window = config.windows[layer] if config.windows else None
    theta, scaling = config.rope_theta, config.rope_scaling
    if window is not None and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    frequencies = rope_frequencies(config.rotary_width, theta, scaling)
    return LayerNumbers(jnp.zeros_like(frequencies) if layer in config.nope_layers else frequencies, window)


def stacked_numbers(config: ModelConfig) -> LayerNumbers:
    """`layer_numbers` of all layers, for a scan over them."""
    layers = [layer_numbers(config, i) for i in range(config.n_layers)]
    windows = jnp.asarray([EVERYTHING if n.window is None else n.window for n in layers])
    return LayerNumbers(jnp.stack([n.frequencies for n in layers]), windows if config.windows else None)


class Scene(NamedTuple):
    """Everything that all layers see alike."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None
    """None: all are of one document."""
    visible: Bool[Array, "#B T S"] | None
    """Causal, and of the same document; None where a kernel does without (`fused.py`)."""
    distances: Int[Array, "B T S"] | None
    """Positions back from query to key; None where no layer has a window."""
    start: Int[Array, ""]
    """Slots of the cache filled before."""


def to_attend(
    queries: Float[Array, "B T N K"], keys: Float[Array, "B H T K"], values: Float[Array, "B H T K"]
) -> tuple[Float[Array, "B T N K"], Float[Array, "B G T K"], Float[Array, "B G T K"]]:
    """Whole sequences for each device, of fewer heads: from where sequences are cut, by an all-to-all.

    Heads of keys that are fewer than the devices are repeated.

    Reference: Jacobs et al. 2023 (DeepSpeed-Ulysses), https://arxiv.org/abs/2309.14509.
    """
    own = keys.shape[1]
    times = math.lcm(own, parts(queries.shape[2], "attending")) // own
    queries = constrain(constrain(queries, "batch", "time", "heads"), "batch", None, "attending")

    def moved(x: Array) -> Array:
        x = constrain(x, "batch", "heads", "time")  # what goes before stays where it is, and so does its gradient
        if times > 1:
            x = constrain(jnp.repeat(x, times, axis=1), "batch", "heads", "time")
        return constrain(x, "batch", "attending")

    return queries, moved(keys), moved(values)


def attend(
    config: ModelConfig,
    queries: Float[Array, "B T N K"],
    keys: Float[Array, "B H S K"],
    values: Float[Array, "B H S K"],
    visible: Bool[Array, "#B T S"],
) -> Float[Array, "B T NK"]:
    """softmax(cap(q·k·scale)) v over what is visible, the softmax in float32.

    Reference: Ainslie et al. 2023 (grouped queries), https://arxiv.org/abs/2305.13245.
    """
    batch, length, _, head_dim = queries.shape
    # Query heads of a group share keys: they are laid along time, [B, H, G·T, K].
    n_kv_heads = keys.shape[1]
    groups = queries.shape[2] // n_kv_heads
    queries = queries.reshape(batch, length, n_kv_heads, groups, head_dim)
    queries = queries.transpose(0, 2, 3, 1, 4).reshape(batch, n_kv_heads, groups * length, -1)
    scores = jnp.matmul(queries, keys.swapaxes(2, 3), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, n_kv_heads, groups, length, -1)
    scale = head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    scores = soft_cap(scores * scale, config.attention_softcap)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), axis=-1).astype(
        config.precision.compute
    )
    attended = weights.reshape(batch, n_kv_heads, groups * length, -1) @ values
    attended = attended.reshape(batch, n_kv_heads, groups, length, head_dim)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)


def attend_causally(
    config: ModelConfig,
    queries: Float[Array, "B T N K"],
    keys: Float[Array, "B H S K"],
    values: Float[Array, "B H S K"],
    visible: Bool[Array, "#B T S"],
) -> Float[Array, "B T NK"]:
    """`attend` where nothing after a query is visible: each of a few blocks of queries reads only keys up to its end.

    The last query is at the last key or before it. Four blocks read 5/8 of the scores that one would where T = S, in
    time and in memory.
    """
    length, before = queries.shape[1], keys.shape[2] - queries.shape[1]
    size = max(-(-length // BLOCKS), LEAST_BLOCK)
    blocks = [
        attend(
            config,
            queries[:, i : i + size],
            keys[:, :, : before + i + size],
            values[:, :, : before + i + size],
            visible[:, i : i + size, : before + i + size],
        )
        for i in range(0, length, size)
    ]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
