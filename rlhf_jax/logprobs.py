"""Log-probabilities of tokens, and entropy, from logits or straight from hidden states."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from rlhf_jax.kl import ScalarLike
from rlhf_jax.masking import masked_sum


def token_logprobs(logits: Float[Array, "*shape V"], targets: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log π(target): float32 log-softmax of the logits, at the target."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def token_entropy(logits: Float[Array, "*shape V"]) -> Float[Array, "*shape"]:
    """H = −Σᵥ πᵥ log πᵥ, in nats. A logit of −inf counts for nothing."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    probs = jnp.exp(logprobs)
    return -jnp.where(probs > 0, probs * jnp.where(probs > 0, logprobs, 0.0), 0.0).sum(axis=-1)


def sequence_logprobs(logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """log π(y|x) = Σ_t log π(y_t|x, y_<t), over the unmasked tokens."""
    return masked_sum(logprobs, mask, axis=-1)


def soft_cap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap·tanh(x / cap), which stays below `cap`; x itself for None.

    Reference: Gemma Team 2024, §2, https://arxiv.org/abs/2408.00118.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def chunked_logprobs(
    hidden: Float[Array, "B T D"],
    head_kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk_size: int,
    softcap: float | None = None,
    temperature: ScalarLike = 1.0,
) -> Float[Array, "B T"]:
    """`token_logprobs(hidden @ head_kernel, targets)` with the logits of only `chunk_size` columns in memory.

    Exact in value and in gradient: each chunk's logits are computed again in the backward pass, so that no
    [B, T, V] array exists in either. Chunks run along T, so that rows may stay sharded. The logits go through
    `soft_cap`, then are divided by the temperature. Raises ValueError if chunk_size is not positive.
    """

    def score(logits: Array, targets: Array) -> Array:
        return token_logprobs(soft_cap(logits, softcap) / temperature, targets)

    return _chunked(score, hidden, head_kernel, targets, chunk_size)


def chunked_logprobs_and_entropy(
    hidden: Float[Array, "B T D"],
    head_kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk_size: int,
    softcap: float | None = None,
    temperature: ScalarLike = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """As `chunked_logprobs`, with the entropy of each distribution beside it."""

    def score(logits: Array, targets: Array) -> tuple[Array, Array]:
        logits = soft_cap(logits, softcap) / temperature
        return token_logprobs(logits, targets), token_entropy(logits)

    return _chunked(score, hidden, head_kernel, targets, chunk_size)


def _chunked(score, hidden, head_kernel, targets, chunk_size):
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    rows, length, width = hidden.shape
    chunk_size = min(chunk_size, length)

    # The kernel's gradient is a sum over chunks: in half precision its error would grow with their number.
    dtype, head_kernel = head_kernel.dtype, head_kernel.astype(jnp.float32)

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(kernel, xs):
        h, t = xs
        logits = jnp.einsum("btd,dv->btv", h, kernel.astype(dtype), preferred_element_type=jnp.float32)
        return score(logits, t)

    if chunk_size == length:
        return chunk(head_kernel, (hidden, targets))
    pad = -length % chunk_size
    # Padding columns are scored too, then cut off; their cotangent is zero.
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))
    xs = (
        hidden.reshape(rows, -1, chunk_size, width).swapaxes(0, 1),
        targets.reshape(rows, -1, chunk_size).swapaxes(0, 1),
    )
    scores = jax.lax.map(partial(chunk, head_kernel), xs)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :length], scores)
