"""Sums, means and whitening over the True entries of a mask. Whatever stands elsewhere, NaN included, is ignored.

Results are float32 whatever comes in. Each function raises ValueError for a mask of another shape, or of floats.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from rlhf_jax.arrays import boolean, check_shapes, wide

Axis = int | Sequence[int] | None


def masked_sum(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: Axis = None) -> Float[Array, "*rest"]:
    """Sum of `x` where `mask`; 0 where nothing is unmasked."""
    check_shapes({"x": x, "mask": mask})
    return jnp.where(boolean(mask), wide(x), 0.0).sum(axis=axis)


def masked_mean(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: Axis = None) -> Float[Array, "*rest"]:
    """Mean of `x` where `mask`; 0 where nothing is unmasked."""
    total = masked_sum(x, mask, axis)
    return total / jnp.maximum(boolean(mask).sum(axis=axis), 1).astype(total.dtype)


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
