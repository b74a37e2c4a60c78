"""Attention by kernels that never hold the scores: splash attention on TPUs, cuDNN's on NVIDIA GPUs.

`attention.py` is what they are equal to. They serve a sequence that reads itself; a cache is read there.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Float, Int

from rlhf_jax.axes import on_parts, parts
from rlhf_jax.models.attention import EVERYTHING
from rlhf_jax.models.config import ModelConfig

AttentionKernel = Literal["reference", "splash", "cudnn"]
LANES = 128
"""Splash attention's blocks are multiples of it. A shorter sequence is not worth a kernel."""
BLOCK = 512
"""The largest block of splash attention, as MaxText has it."""


def attention_kernel(config: ModelConfig, length: int) -> AttentionKernel:
    """How a sequence of that length reads itself: `config.attention`, where "auto" goes by the platform.

    That is the platform of the mesh that is set, whose devices need not be there, or of `jax.default_backend()`. On
    CPUs, for sequences below 128 tokens, and where cuDNN refuses, "auto" is `attention.py`. Raises ValueError for a
    config that asks for cuDNN and for what it refuses.
    """
    if config.attention in ("reference", "splash"):
        return config.attention
    refused = _cudnn_refuses(config)
    if config.attention == "cudnn":
        if refused:
            raise ValueError(f"attention 'cudnn' {refused}; 'auto' does without it")
        return "cudnn"
    platform = _platform()
    if length < LANES or platform not in ("tpu", "gpu"):
        return "reference"
    if platform == "tpu":
        return "splash"
    return "cudnn" if not refused and _has_flash_attention() else "reference"


def fused(
    config: ModelConfig,
    queries: Float[Array, "B T N K"],
    keys: Float[Array, "B H T K"],
    values: Float[Array, "B H T K"],
    segment_ids: Int[Array, "B T"] | None,
    window: Int[ArrayLike, ""] | None,
    *,
    kernel: Callable[..., Array],
) -> Float[Array, "B T NK"]:
    """`attend` over what is not later, of the same segment and inside the window, by `splash` or `cudnn`.

    A window counts slots, where `attention.py` counts positions: the same where these count each document's tokens
    one by one, as all of `data/` does. Each device of a mesh works on its rows and heads, of whole sequences; where
    the mesh does not divide the heads of the keys, each on all heads.
    """
    cut = "attending" if parts(queries.shape[1], "time") > 1 else "heads"
    heads = cut if parts(keys.shape[1], cut) > 1 else None
    arrays = [queries, keys, values, *([] if segment_ids is None else [segment_ids])]
    axes = [("batch", None, heads), ("batch", heads), ("batch", heads), ("batch",)][: len(arrays)]

    def attend_within(window: ArrayLike | None) -> Array:
        def local(queries: Array, keys: Array, values: Array, segment_ids: Array | None = None) -> Array:
            return kernel(config, queries, keys, values, segment_ids, window)

        return on_parts(local, arrays, axes)

    if isinstance(window, Array):  # One of a scan's: a kernel is made for a window that is known.
        sizes = sorted({EVERYTHING if w is None else w for w in config.windows})
        branches = [partial(attend_within, size) for size in sizes]
        attended = jax.lax.switch(jnp.searchsorted(jnp.asarray(sizes), window), branches)
    else:
        attended = attend_within(window)
    return attended.reshape(*queries.shape[:2], -1)


def splash(
    config: ModelConfig,
    queries: Float[Array, "B T N K"],
    keys: Float[Array, "B H T K"],
    values: Float[Array, "B H T K"],
    segment_ids: Int[Array, "B T"] | None,
    window: int | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N K"]:
    """By JAX's splash attention, a flash attention that skips blocks outside of the window. `interpret` runs on CPU.

    Queries are scaled before they are rounded to their dtype, not the scores after.

    Reference: Dao 2023, https://arxiv.org/abs/2307.08691.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    length, heads, head_dim = queries.shape[1:]
    blocks = -(-length // BLOCK)
    block = _ceil(-(-length // blocks), LANES)
    padded = blocks * block
    # What pads the end is seen by none before it, so its segments do not matter.
    pad = partial(_pad, length=padded)
    scale = head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    queries = (queries.astype(jnp.float32) * scale).astype(queries.dtype).swapaxes(1, 2)
    mask: splash_attention.CausalMask | splash_attention.LocalMask
    if window is None or window >= length:
        mask = splash_attention.CausalMask((padded, padded))
    else:
        mask = splash_attention.LocalMask((padded, padded), (window - 1, 0), 0)
    attend = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(*(block,) * 8),
        attn_logits_soft_cap=config.attention_softcap,
        interpret=interpret,
    )
    if segment_ids is None:
        attended = jax.vmap(attend)(pad(queries), pad(keys), pad(values))
    else:
        segments = pad(segment_ids, axis=1)
        attended = jax.vmap(attend)(
            pad(queries), pad(keys), pad(values), splash_attention.SegmentIds(segments, segments)
        )
    return attended[:, :, :length].swapaxes(1, 2)


def cudnn(
    config: ModelConfig,
    queries: Float[Array, "B T N K"],
    keys: Float[Array, "B H T K"],
    values: Float[Array, "B H T K"],
    segment_ids: Int[Array, "B T"] | None,
    window: int | None,
    *,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "B T N K"]:
    """By `jax.nn.dot_product_attention`: with segments, a mask [B, 1, T, T] is in memory, though no scores are.

    Segments and windows are both in the mask: cuDNN's own windows are not made to go with one. The tests lower it for
    GPUs; it has not been run on one, since none was at hand.
    """
    length = queries.shape[1]
    # cuDNN's backward pass with a mask is for even lengths.
    pad = partial(_pad, length=_ceil(length, 2), axis=1)
    queries, keys, values = pad(queries), pad(keys.swapaxes(1, 2)), pad(values.swapaxes(1, 2))
    mask = None
    if segment_ids is not None:
        segments = pad(segment_ids)
        mask = segments[:, None, :, None] == segments[:, None, None, :]
    if window is not None and window < length:
        slots = jnp.arange(queries.shape[1])
        near = (slots[:, None] - slots[None, :] < window)[None, None]
        mask = near if mask is None else mask & near
    attended = jax.nn.dot_product_attention(
        queries, keys, values, mask=mask, scale=config.attention_scale, is_causal=True, implementation=implementation
    )
    return attended[:, :length]


def _ceil(length: int, multiple: int) -> int:
    return length + -length % multiple


def _pad(x: Array, *, length: int, axis: int = 2) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _cudnn_refuses(config: ModelConfig) -> str | None:
    if config.attention_softcap is not None:
        return "has no soft cap"
    if config.precision.compute not in (jnp.bfloat16, jnp.float16):
        return "is for arithmetic in half precision (--precision mixed or bfloat16)"
    if config.head_dim % 8 or config.head_dim > 128:
        return f"is for a head_dim that is a multiple of 8 and at most 128, not {config.head_dim}"
    return None


def _has_flash_attention() -> bool:
    device = jax.local_devices(backend="gpu")[0]
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8
