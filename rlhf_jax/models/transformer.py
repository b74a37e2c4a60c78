"""One decoder for every family: `ModelConfig` says how it is built; prefill and decoding are the same code."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from rlhf_jax.axes import LINEAR, PARAMETERS, constrain, parts, ways
from rlhf_jax.errors import UserError
from rlhf_jax.logprobs import soft_cap
from rlhf_jax.models.attention import (
    LayerNumbers,
    Scene,
    attend_causally,
    layer_numbers,
    stacked_numbers,
    to_attend,
)
from rlhf_jax.models.cache import KVCache
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.fused import attention_kernel, cudnn, fused, splash
from rlhf_jax.models.rope import LongRope, rotate

LORA_LEAVES = ("lora_a", "lora_b", "lora_scale")
"""The leaves that an adapter adds beside a kernel."""


class Dropout(NamedTuple):
    """The leaf `lora_dropout`, which `with_dropout` adds to an adapter for the loss of one step."""

    key: PRNGKeyArray
    rate: Float[Array, ""]


class Norm(nn.Module):
    """x / √(mean(x²) + ε) · (scale + offset), or a layer norm, over the last axis and in float32.

    Reference: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467; Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """

    config: ModelConfig
    dtype: Any = None
    """The dtype of the result; that of x unless given."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        offset, width = self.config.norm_offset, x.shape[-1]
        scale = self.param("scale", nn.initializers.constant(1.0 - offset), (width,)) + offset
        x32 = x.astype(jnp.float32)
        if self.config.norm == "layer":
            x32 = x32 - x32.mean(axis=-1, keepdims=True)
        variance = jnp.square(x32).mean(axis=-1, keepdims=True)
        before = tuple(range(x.ndim - 1))
        x32 = x32 * jax.lax.rsqrt(variance + self.config.norm_eps) * jnp.expand_dims(scale, before)
        if self.config.norm == "layer":
            x32 = x32 + jnp.expand_dims(self.param("bias", nn.initializers.zeros, (width,)), before)
        return x32.astype(self.dtype or x.dtype)


class Linear(nn.Module):
    """x W, and + b with a `bias`; `kernel` is [in, out]. Where its parameters hold an adapter, x W + s·(x A) B.

    Where they hold a `kernel_scale`, the kernel is int8 and W = kernel·diag(kernel_scale).

    Reference: Hu et al. 2021, eq. 3, https://arxiv.org/abs/2106.09685; see `lora.py`.
    """

    config: ModelConfig
    features: int
    scale: float = 1.0
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(self.scale, "fan_in", "normal")
        dtype = self.config.precision.compute
        kernel = self.param("kernel", init, (x.shape[-1], self.features), self.config.precision.parameters)
        # Flat rows: XLA's CPU backend contracts two leading axes at half the speed in the backward pass. Rows that are
        # cut along time, too, stay where they are.
        inputs = x if parts(x.shape[1], "time") > 1 else x.reshape(-1, x.shape[-1])
        before = tuple(range(inputs.ndim - 1))
        if self.has_variable("params", "kernel_scale"):
            # Scanned layers keep the int8 kernel for the backward pass, not what it is converted to.
            rows = jax.checkpoint(lambda x, q: x @ q.astype(dtype))(inputs, kernel)
            rows = (rows * jnp.expand_dims(self.get_variable("params", "kernel_scale"), before)).astype(dtype)
        else:
            rows = inputs @ kernel.astype(dtype)
        if self.has_variable("params", "lora_a"):
            rows = rows + self._low_rank(inputs)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            rows = rows + jnp.expand_dims(bias.astype(dtype), before)
        # Out of attention and feed-forward the residual stream, of which each device has its rows whole.
        out = LINEAR[self.name][1] if self.name in LINEAR else "embed"
        return constrain(rows.reshape(*x.shape[:-1], -1), "batch", "time", None if out == "embed" else out)

    def _low_rank(self, inputs: Array) -> Array:
        a, b, scale = (self.get_variable("params", name) for name in LORA_LEAVES)
        dtype = self.config.precision.compute
        if self.has_variable("params", "lora_dropout"):
            key, rate = self.get_variable("params", "lora_dropout")
            kept = jax.random.bernoulli(key, 1 - rate, inputs.shape)
            inputs = jnp.where(kept, inputs / (1 - rate).astype(dtype), 0)
        return inputs @ a.astype(dtype) @ (b * jax.lax.stop_gradient(scale)).astype(dtype)


Layer = tuple[Array, Array]  # one layer's keys and values in the cache, [B, H, S, K]


class Stacked(NamedTuple):
    """The residual stream of one token, and the caches of all scanned layers, [L, B, H, S, K], which each layer writes
    in place: as inputs and outputs of the scan they would be copied whole for each token."""

    x: Array
    keys: Array
    values: Array


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class Block(nn.Module):
    """Attention and feed-forward, each normed and added to the residual.

    Reference: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Shazeer 2020 (the gate),
    https://arxiv.org/abs/2002.05202.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Array | Stacked, layer: Layer | Array | None, numbers: LayerNumbers | None, scene: Scene
    ) -> tuple[Array | Stacked, Layer | None]:
        """`numbers` are those of the first layer unless given. With `Stacked`, `layer` is the layer's number."""
        config = self.config
        stacked, x = (x, x.x) if isinstance(x, Stacked) else (None, x)
        if numbers is None:
            numbers = layer_numbers(config, 0)
        residual = 1.0 / (2 * config.n_layers)  # keeps the residual stream's variance with depth
        before, after = config.norm_at != "output", config.norm_at != "input"

        h = Norm(config, name="attention_norm")(x) if before else x
        h, layer = self.attention(h, layer, stacked, numbers, scene)
        h = constrain(h, "batch", "time", "heads")
        h = Linear(config, config.d_model, residual, config.output_bias, name="output")(h)
        attended = x + (Norm(config, name="attention_post_norm")(h) if after else h)

        h = x if config.parallel_residual else attended
        h = Norm(config, name="feed_forward_norm")(h) if before else h
        act = ACTIVATIONS[config.activation]
        if config.gated_mlp:
            gate = Linear(config, config.d_ff, bias=config.mlp_bias, name="gate")(h)
            h = act(gate) * Linear(config, config.d_ff, bias=config.mlp_bias, name="up")(h)
        else:
            h = act(Linear(config, config.d_ff, bias=config.mlp_bias, name="up")(h))
        h = Linear(config, config.d_model, residual, config.mlp_bias, name="down")(h)
        out = attended + (Norm(config, name="feed_forward_post_norm")(h) if after else h)
        return (out, layer) if stacked is None or layer is None else (Stacked(out, *layer), None)

    def attention(
        self, h: Array, layer: Any, stacked: Stacked | None, numbers: LayerNumbers, scene: Scene
    ) -> tuple[Array, Layer | None]:
        """The output of the heads, [B, T, N·K], and the layer's cache, or all, with these keys and values in it."""
        config = self.config
        queries = self.heads("query", h, config.n_heads, numbers, scene)
        keys = self.heads("key", h, config.n_kv_heads, numbers, scene).swapaxes(1, 2)
        values = self.heads("value", h, config.n_kv_heads, numbers, scene).swapaxes(1, 2)
        if layer is None and parts(h.shape[1], "time") > 1:
            queries, keys, values = to_attend(queries, keys, values)
        zero = jnp.zeros_like(scene.start)
        if stacked is not None:
            place = (layer, zero, zero, scene.start, zero)
            written = (
                jax.lax.dynamic_update_slice(whole, new[None], place)
                for whole, new in ((stacked.keys, keys), (stacked.values, values))
            )
            number, layer = layer, tuple(written)
            keys, values = (jax.lax.dynamic_index_in_dim(whole, number, keepdims=False) for whole in layer)
        elif layer is not None:
            keys = jax.lax.dynamic_update_slice(layer[0], keys, (zero, zero, scene.start, zero))
            values = jax.lax.dynamic_update_slice(layer[1], values, (zero, zero, scene.start, zero))
            layer = keys, values
        visible = scene.visible
        if visible is None:
            kernel = splash if attention_kernel(config, h.shape[1]) == "splash" else cudnn
            return fused(config, queries, keys, values, scene.segment_ids, numbers.window, kernel=kernel), layer
        if numbers.window is not None and scene.distances is not None:
            visible = visible & (scene.distances < numbers.window)
        return attend_causally(config, queries, keys, values, visible), layer

    def heads(self, name: str, h: Array, count: int, numbers: LayerNumbers, scene: Scene) -> Array:
        """Queries, keys or values, [B, T, count, K], turned to their positions."""
        config = self.config
        out = Linear(config, count * config.head_dim, bias=config.qkv_bias, name=name)(h)
        norm = None if config.qk_norm is None or name == "value" else Norm(config, name=f"{name}_norm")
        if norm is not None and config.qk_norm == "projection":
            out = norm(out)
        out = out.reshape(*out.shape[:2], count, config.head_dim)
        if norm is not None and config.qk_norm == "head":
            out = norm(out)
        if name == "value" or not config.rotary_width:
            return out
        magnitude = config.rope_scaling.attention_factor if isinstance(config.rope_scaling, LongRope) else 1.0
        return rotate(out, scene.positions, numbers.frequencies, magnitude)


class Transformer(nn.Module):
    """A decoder with a language head.

    `positions` count from 0 unless given; `segment_ids` are all 1 unless given. A token attends to those before it
    that have its segment id; 0 is padding, whose outputs are finite and mean nothing. Raises ValueError for a
    sequence, or a cache, longer than the config's `length_limit`.
    """

    config: ModelConfig

    def setup(self) -> None:
        config, (dtype, _, head_dtype) = self.config, self.config.precision
        init = nn.initializers.normal(config.d_model**-0.5)
        self.embedding = self.param("embedding", init, (config.vocab_size, config.d_model), dtype)
        if config.learned_positions:
            shape = (config.max_length, config.d_model)
            self.position_embedding = self.param("position_embedding", init, shape, dtype)
        block = Block
        if config.remat:
            keep = config.remat if callable(config.remat) else None
            block = nn.remat(Block, prevent_cse=not config.scan_layers, policy=keep)
        if config.scan_layers:
            self.layers = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.n_layers,
                in_axes=(0, 0, nn.broadcast), out_axes=0,
            )(config)  # fmt: skip
        else:
            self.layers = [block(config, name=f"layer_{i}") for i in range(config.n_layers)]
        self.final_norm = Norm(config, head_dtype)
        if not config.tie_embeddings:
            self.head = self.param("head", init, (config.d_model, config.vocab_size), dtype)

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
        logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return constrain(soft_cap(logits, self.config.final_softcap), "batch", "time", "vocab")

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The final hidden states, normed, in `precision.head`: what the heads read.

        Raises UserError where the mesh cuts sequences and does not divide the heads.
        """
        real = tokens.shape[1]
        if positions is None:
            positions = jnp.broadcast_to(jnp.expand_dims(jnp.arange(real), 0), tokens.shape)
        heads, cut = self.config.n_heads, ways("attending")
        if ways("time") > 1 and heads % cut:
            raise UserError(f"{heads} heads do not divide over sequence × tensor = {cut} parts of the mesh")
        if more := -real % ways("time"):  # at the end, where nothing before sees it
            tokens, positions = (jnp.pad(x, ((0, 0), (0, more))) for x in (tokens, positions))
            segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, more)))
        length = real + more
        visible = distances = None
        if attention_kernel(self.config, length) == "reference":
            visible, distances = jnp.tri(length, dtype=bool)[None], self._distances(positions, positions)
            if segment_ids is not None:
                visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
        scene = Scene(positions, segment_ids, visible, distances, jnp.zeros((), jnp.int32))
        hidden, _ = self._run(tokens, None, scene, real)
        return hidden[:, :real]

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache,
        ring: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Reads T more tokens after those in the cache: a prompt, or one sampled token. Returns hidden states too.

        In a `ring` slot `used` modulo S is written, and a token (T = 1) sees all slots of its segment: what is of
        another row's past has another segment id by then.
        """
        length, count = tokens.shape[1], cache.segment_ids.shape[1]
        start = cache.used % count if ring else cache.used
        zero = jnp.zeros_like(start)
        segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (zero, start))
        places = jax.lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), (zero, start))
        visible = segments[:, None, :] == segment_ids[:, :, None]
        if not ring:
            causal = jnp.arange(count)[None, :] <= (start + jnp.arange(length))[:, None]
            visible = causal[None] & visible
        scene = Scene(positions, segment_ids, visible, self._distances(positions, places), start)
        hidden, layers = self._run(tokens, (cache.keys, cache.values), scene, count)
        keys, values = layers
        return hidden, KVCache(keys, values, segments, cache.used + length, places)

    def _distances(self, queries: Array, keys: Array) -> Array | None:
        return queries[:, :, None] - keys[:, None, :] if any(self.config.windows) else None

    def _run(self, tokens: Array, layers: Any, scene: Scene, length: int) -> tuple[Array, Any]:
        config = self.config
        limit = config.length_limit
        if limit is not None and length > limit:
            raise ValueError(f"a sequence of {length} tokens is longer than the {limit} that this model can read")
        dtype = config.precision.compute
        # On a mesh each device looks up its columns of all rows, which then go where the rows are; the table stays.
        x = constrain(self.embedding, *PARAMETERS["embedding"])[constrain(tokens, "copy")].astype(dtype)
        x = constrain(constrain(x, "copy", None, "embed"), "copy", "time", "columns")
        if config.embedding_scale != 1:
            x = x * jnp.asarray(config.embedding_scale, dtype)
        if config.learned_positions:
            x = x + self.position_embedding[scene.positions].astype(dtype)
        x = constrain(x, "batch", "time")
        if config.scan_layers:
            differ = any(config.windows) or config.nope_layers
            numbers = stacked_numbers(config) if differ else None
            if layers is not None and tokens.shape[1] == 1:
                each = jnp.arange(config.n_layers, dtype=scene.start.dtype)
                (x, *layers), _ = self.layers(Stacked(x, *layers), each, numbers, scene)
            else:
                x, layers = self.layers(x, layers, numbers, scene)
        else:
            outputs = []
            for i, block in enumerate(self.layers):
                layer = None if layers is None else (layers[0][i], layers[1][i])
                x, layer = block(x, layer, layer_numbers(config, i), scene)
                outputs.append(layer)
            if layers is not None:
                layers = tuple(k for k, _ in outputs), tuple(v for _, v in outputs)
        return self.final_norm(x), layers


def head_kernel(params: Any) -> Float[Array, "D V"]:
    """The language head's kernel: its own, or the transposed embedding where they are tied."""
    kernel = params["head"] if "head" in params else params["embedding"].T
    return constrain(kernel, None, "vocab")
