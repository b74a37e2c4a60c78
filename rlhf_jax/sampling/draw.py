"""Drawing one token a row from logits."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

BLOCK = 256  # Vocabularies past this are searched in two levels.


def truncate(logits: Float[Array, "B V"], *, top_k: int | None, top_p: Array | None) -> Float[Array, "B V"]:
    """−inf for all but the top_k largest, and then all but the smallest set of at least top_p probability.

    Ties at the edge of either stay in. Reference: Fan et al. 2018, https://arxiv.org/abs/1805.04833; Holtzman et al.
    2019, §3.1, https://arxiv.org/abs/1904.09751.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        # Rounding may bring the sum to 1 before the last entries: with top_p 1 they stay in all the same.
        kept = (jnp.cumsum(probs, axis=-1) - probs < top_p) | (top_p >= 1.0)
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def choose(
    logits: Float[Array, "B V"],
    uniform: Float[Array, " B"] | None,
    *,
    temperature: Array,
    top_k: int | None,
    top_p: Array | None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token for each row and its log-probability, after `truncate`. Without uniform numbers it is the likeliest one.

    Then the log-probability is that at temperature 1.
    """
    if uniform is not None:
        return draw(truncate(logits / temperature, top_k=top_k, top_p=top_p), uniform)
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = truncate(logits, top_k=top_k, top_p=top_p)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def draw(logits: Float[Array, "B V"], uniform: Float[Array, " B"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token of softmax(logits) by inverse CDF, from one uniform number a row, and its log-probability.

    One number instead of a Gumbel an entry: with 32k entries that noise costs more than the model. A token of
    probability 0 is never drawn.
    """
    largest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = weights.sum(axis=-1)
    tokens = _search(weights, uniform * total)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - largest[:, 0] - jnp.log(total)


def _search(weights: Array, point: Array) -> Array:
    """The first entry at which the running sum passes `point`, among those of positive weight."""
    size = weights.shape[-1]
    if size <= BLOCK:
        return _first(weights, point)[0]
    weights = jnp.pad(weights, ((0, 0), (0, -size % BLOCK))).reshape(weights.shape[0], -1, BLOCK)
    block, before = _first(weights.sum(axis=-1), point)
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _first(inside, point - before)[0]


def _first(weights: Array, point: Array) -> tuple[Array, Array]:
    """Where the running sum passes `point`, and the sum before it; the last positive one if rounding hides it."""
    sums = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    passed = (sums > point[:, None]) & positive
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    index = jnp.where(passed.any(axis=-1), jnp.argmax(passed, axis=-1), last).astype(jnp.int32)
    before = jnp.take_along_axis(sums - weights, index[:, None], axis=-1)[:, 0]
    return index, before
