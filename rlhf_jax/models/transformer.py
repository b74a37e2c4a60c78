"""One decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU; prefill and decoding in the same code."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

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


def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty cache for `batch` sequences of at most `slots` tokens."""
    shape = (batch, config.n_kv_heads, slots, config.head_dim)

    def empty() -> Any:
        if config.scan_layers:
            return jnp.zeros((config.n_layers, *shape), config.dtype)
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.n_layers))

    return KVCache(empty(), empty(), jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))


def rotate(x: Float[Array, "B T H K"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T H K"]:
    """Rotary positions, half rotation: (x₁, x₂) -> (x₁ cos − x₂ sin, x₂ cos + x₁ sin), in float32.

    Reference: Su et al. 2021, eq. 34, https://arxiv.org/abs/2104.09864.
    Deviation: pairs are (i, i + K/2), as in Hugging Face checkpoints, not (2i, 2i + 1).
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · scale, in float32. Reference: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        variance = jnp.square(x32).mean(axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(variance + self.config.norm_eps) * jnp.expand_dims(scale, (0, 1))).astype(x.dtype)


class Linear(nn.Module):
    """x W, without a bias; `kernel` is [in, out]."""

    config: ModelConfig
    features: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(self.scale, "fan_in", "normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        # Flat rows: XLA's CPU backend contracts two leading axes at half the speed in the backward pass.
        return (x.reshape(-1, x.shape[-1]) @ kernel.astype(self.config.dtype)).reshape(*x.shape[:-1], -1)


Layer = tuple[Array, Array]  # one layer's keys and values in the cache, [B, H, S, K]


class Block(nn.Module):
    """Attention and feed-forward, each pre-normed and added to the residual."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Array, layer: Layer | None, positions: Array, visible: Array, start: Array
    ) -> tuple[Array, Layer | None]:
        config = self.config
        batch, length, _ = x.shape
        residual = 1.0 / (2 * config.n_layers)  # keeps the residual stream's variance with depth

        h = RMSNorm(config, name="attention_norm")(x)
        queries = Linear(config, config.n_heads * config.head_dim, name="query")(h)
        keys = Linear(config, config.n_kv_heads * config.head_dim, name="key")(h)
        values = Linear(config, config.n_kv_heads * config.head_dim, name="value")(h)
        queries = rotate(queries.reshape(batch, length, config.n_heads, -1), positions, config.rope_theta)
        keys = rotate(keys.reshape(batch, length, config.n_kv_heads, -1), positions, config.rope_theta)
        keys = keys.swapaxes(1, 2)
        values = values.reshape(batch, length, config.n_kv_heads, -1).swapaxes(1, 2)
        if layer is not None:
            zero = jnp.zeros_like(start)
            keys = jax.lax.dynamic_update_slice(layer[0], keys, (zero, zero, start, zero))
            values = jax.lax.dynamic_update_slice(layer[1], values, (zero, zero, start, zero))
            layer = keys, values
        # Query heads of a group share keys: they are laid along time, [B, H, G·T, K].
        groups = config.n_heads // config.n_kv_heads
        queries = queries.reshape(batch, length, config.n_kv_heads, groups, config.head_dim)
        queries = queries.transpose(0, 2, 3, 1, 4).reshape(batch, config.n_kv_heads, groups * length, -1)
        scores = jnp.matmul(queries, keys.swapaxes(2, 3), preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, config.n_kv_heads, groups, length, -1)
        scores = jnp.where(visible[:, None, None], scores * config.head_dim**-0.5, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(config.dtype)
        attended = weights.reshape(batch, config.n_kv_heads, groups * length, -1) @ values
        attended = attended.reshape(batch, config.n_kv_heads, groups, length, config.head_dim)
        attended = attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)
        x = x + Linear(config, config.d_model, residual, name="output")(attended)

        h = RMSNorm(config, name="feed_forward_norm")(x)
        gate = Linear(config, config.d_ff, name="gate")(h)
        up = Linear(config, config.d_ff, name="up")(h)
        x = x + Linear(config, config.d_model, residual, name="down")(jax.nn.silu(gate) * up)
        return x, layer


class Transformer(nn.Module):
    """A decoder with a language head.

    `positions` count from 0 unless given; `segment_ids` are all 1 unless given. A token attends to those before it
    that have its segment id; 0 is padding, whose outputs are finite and mean nothing.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.d_model**-0.5)
        self.embedding = self.param("embedding", init, (config.vocab_size, config.d_model))
        block = nn.remat(Block, prevent_cse=not config.scan_layers) if config.remat else Block
        if config.scan_layers:
            broadcast = nn.broadcast
            self.layers = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.n_layers,
                in_axes=(0, broadcast, broadcast, broadcast), out_axes=0,
            )(config)  # fmt: skip
        else:
            self.layers = [block(config, name=f"layer_{i}") for i in range(config.n_layers)]
        self.final_norm = RMSNorm(config)
        if not config.tie_embeddings:
            self.head = self.param("head", init, (config.d_model, config.vocab_size))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits."""
        return self.logits(self.hidden_states(tokens, positions, segment_ids))

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The language head: float32 logits of final hidden states."""
        kernel = self.embedding.T if self.config.tie_embeddings else self.head
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The final hidden states, normed: what the heads read."""
        length = tokens.shape[1]
        if positions is None:
            positions = jnp.broadcast_to(jnp.expand_dims(jnp.arange(length), 0), tokens.shape)
        visible = jnp.tri(length, dtype=bool)[None]
        if segment_ids is not None:
            visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
        hidden, _ = self._run(tokens, None, positions, visible, jnp.zeros((), jnp.int32))
        return hidden

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Reads T more tokens after those in the cache: a prompt, or one sampled token. Returns hidden states too."""
        start, length = cache.used, tokens.shape[1]
        zero = jnp.zeros_like(start)
        segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (zero, start))
        slots = jnp.arange(segments.shape[1])
        causal = slots[None, :] <= (start + jnp.arange(length))[:, None]
        visible = causal[None] & (segments[:, None, :] == segment_ids[:, :, None])
        hidden, layers = self._run(tokens, (cache.keys, cache.values), positions, visible, start)
        keys, values = layers
        return hidden, KVCache(keys, values, segments, start + length)

    def _run(self, tokens: Array, layers: Any, positions: Array, visible: Array, start: Array) -> tuple[Array, Any]:
        x = self.embedding[tokens].astype(self.config.dtype)
        if self.config.scan_layers:
            x, layers = self.layers(x, layers, positions, visible, start)
        else:
            outputs = []
            for i, block in enumerate(self.layers):
                layer = None if layers is None else (layers[0][i], layers[1][i])
                x, layer = block(x, layer, positions, visible, start)
                outputs.append(layer)
            if layers is not None:
                layers = tuple(k for k, _ in outputs), tuple(v for _, v in outputs)
        return self.final_norm(x), layers


def head_kernel(params: Any) -> Float[Array, "D V"]:
    """The language head's kernel: its own, or the transposed embedding where they are tied."""
    return params["head"] if "head" in params else params["embedding"].T
