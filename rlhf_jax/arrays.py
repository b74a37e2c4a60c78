"""Guards that the equations share: shapes that must be equal, float32, ratios that do not overflow.

Shapes and dtypes are known when a function is traced, so these checks cost nothing when it runs.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

LARGEST_LOG_RATIO = 20.0
"""Where exp is continued by its tangent: e²⁰ = 4.9e8, whose square is still far from float32's limit."""


def check_shapes(arrays: Mapping[str, Any], *, rank: int | None = None) -> None:
    """Raises ValueError, with names and shapes, unless all arrays have the shape of the first, of `rank` axes.

    Without it `[B, 1]` or `[T]` beside `[B, T]` would be broadcast to another number without a word.
    """
    shapes = {name: jnp.shape(x) for name, x in arrays.items()}
    (first, shape), *others = shapes.items()
    if rank is not None and len(shape) != rank:
        raise ValueError(f"{first} has the shape {shape}; it must have {rank} axes")
    for name, other in others:
        if other != shape:
            raise ValueError(f"{name} has the shape {other} and {first} {shape}; they must be equal")


def check_leading(arrays: Mapping[str, Any], whole: Mapping[str, Any], *, axes: int = 1) -> None:
    """Raises ValueError, with names and shapes, unless each array has the shape of the first axes of `whole`.

    By default that is [B] for [B, …]; −1 means all axes but the last.
    """
    ((of, x),) = whole.items()
    expected = jnp.shape(x)[:axes]
    for name, array in arrays.items():
        if jnp.shape(array) != expected or not jnp.ndim(x):
            raise ValueError(
                f"{name} has the shape {jnp.shape(array)} and {of} {jnp.shape(x)}; {name} must be {expected}"
            )


def check_number_or_row(arrays: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    """Does what `check_leading` does, and lets numbers pass."""
    check_leading({name: x for name, x in arrays.items() if jnp.ndim(x)}, whole)


def wide(x: Any) -> Array:
    """The array in float32; a float64 one stays what it is."""
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def boolean(mask: Any) -> Array:
    """A mask as booleans. Raises ValueError for one of floats, which may hold weights."""
    mask = jnp.asarray(mask)
    if not (mask.dtype == jnp.bool_ or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise ValueError(f"the mask is of {mask.dtype}; it must be of booleans")
    return mask.astype(jnp.bool_)


def ratio(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """exp(x), and beyond x = 20 its tangent e²⁰ (1 + x − 20): never inf for a finite x, and its gradient never NaN.

    A clipped surrogate then has the loss and the gradient of its limit: 0 · ∞ does not occur.
    """
    return jnp.exp(jnp.minimum(log_ratio, LARGEST_LOG_RATIO)) * (1.0 + jnp.maximum(log_ratio - LARGEST_LOG_RATIO, 0.0))


def ratio_minus_one(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`ratio` minus 1, exact also where the ratio is close to 1."""
    beyond = jnp.maximum(log_ratio - LARGEST_LOG_RATIO, 0.0)
    return jnp.expm1(jnp.minimum(log_ratio, LARGEST_LOG_RATIO)) + jnp.exp(LARGEST_LOG_RATIO) * beyond
