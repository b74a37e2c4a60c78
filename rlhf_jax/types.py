"""Types that signatures share."""

from typing import Any

from jaxtyping import Array, Num

ScalarLike = float | int | Num[Array, ""]
"""A hyperparameter: a number, or an array of no axes, as schedules and vmapped sweeps give."""
Metrics = dict[str, Array]
"""Scalars by name."""
Params = Any
"""A pytree of arrays: nested dicts, as Flax gives them."""
