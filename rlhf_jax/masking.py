"""Sums, means and whitening over the True entries of a mask. Whatever stands elsewhere, NaN included, is ignored.

Results are float32 whatever comes in. Each function raises ValueError for a mask of another shape, or of floats.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from rlhf_jax.arrays import boolean, check_shapes, wide
from rlhf_jax.types import ScalarLike

Axis = int | Sequence[int] | None


def masked_sum(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: Axis = None) -> Float[Array, "*rest"]:
    """Sum of `x` where `mask`; 0 where nothing is unmasked."""
    check_shapes({"x": x, "mask": mask})
    return jnp.where(boolean(mask), wide(x), 0.0).sum(axis=axis)


def masked_mean(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: Axis = None) -> Float[Array, "*rest"]:
    """Mean of `x` where `mask`; 0 where nothing is unmasked."""
    total = masked_sum(x, mask, axis)
    return total / jnp.maximum(boolean(mask).sum(axis=axis), 1).astype(total.dtype)


def sequence_mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over rows of each row's masked mean. Rows with no token do not count; 0 where nothing is unmasked.

    Every response counts alike, and a token less the longer its response is: GRPO's average.
    Reference: Shao et al. 2024, eq. 3, https://arxiv.org/abs/2402.03300.
    """
    return masked_mean(masked_mean(x, mask, axis=-1), boolean(mask).any(axis=-1))


def constant_mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"], *, length: ScalarLike) -> Float[Array, ""]:
    """Sum over (rows × length): every token counts alike, however many there are. Dr. GRPO's average.

    `length` is the longest answer that may be sampled. Rows are all of the batch, also those with no token.
    Reference: Liu et al. 2025, §3.2, https://arxiv.org/abs/2503.20783.
    """
    check_shapes({"x": x, "mask": mask}, rank=2)
    return masked_sum(x, mask) / (x.shape[0] * length)


def masked_whiten(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, shift_mean: bool = True
) -> Float[Array, "*shape"]:
    """`x` with unit variance, and zero mean if `shift_mean`, over the True entries; 0 elsewhere.

        (x − mean) / √(mean((x − mean)²) + 1e-8)

    The variance is the population's: divided by the count, not by one less.
    Reference: `whiten` in the code of Ziegler et al. 2019, https://github.com/openai/lm-human-preferences.
    """
    mean, mask = masked_mean(x, mask), boolean(mask)
    centred = jnp.where(mask, x - mean, 0.0)
    whitened = centred / jnp.sqrt(masked_mean(centred**2, mask) + 1e-8)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0.0)
