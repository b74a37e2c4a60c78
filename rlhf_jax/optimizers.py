"""Optimisers and schedules, all optax's: what decays, what is orthogonalised, and in which order things happen.

Each optimiser clips by global norm first, then steps, and decays weights apart from the gradient (Loshchilov & Hutter
2017, https://arxiv.org/abs/1711.05101), by learning rate × weight decay, sparing norms and biases. Steps of all three
are of about one size, so that a learning rate means the same; states are float32 whatever the parameters are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from rlhf_jax.models.precision import NORMS_AND_BIASES


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """AdamW with β₁ = 0.9, β₂ = 0.95."""
    return _clipped(max_grad_norm, _adamw(learning_rate, weight_decay))


def adafactor(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """Adafactor: no momentum, and of a matrix' second moments only the means of rows and columns.

    Reference: Shazeer & Stern 2018, algorithm 4, https://arxiv.org/abs/1804.04235.
    Deviation: steps are not multiplied by the size of the parameter, which would hold what starts at zero there.
    Matrices with a side below 128 keep all their second moments.
    """

    def decay(step: Any) -> Any:
        return weight_decay * (learning_rate(step) if callable(learning_rate) else learning_rate)

    # optax takes its rate as it is, not times the learning rate.
    factored = optax.adafactor(
        learning_rate,
        multiply_by_parameter_scale=False,
        weight_decay_rate=decay,
        weight_decay_mask=_by_name(_is_decayed),
    )
    return _clipped(max_grad_norm, factored)


def muon(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """Muon for the kernels between embedding and head, each layer's for itself; AdamW for all else.

    Reference: Jordan 2024, https://kellerjordan.github.io/posts/muon/; the factor 0.2·√(max side), which makes steps
    as large as AdamW's, is that of Liu et al. 2025, eq. 4, https://arxiv.org/abs/2502.16982.
    """

    def last_two_axes(params: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params)

    matrices = optax.contrib.muon(
        learning_rate, weight_decay=weight_decay, consistent_rms=0.2, muon_weight_dimension_numbers=last_two_axes
    )
    parts = {"matrix": matrices, "other": _adamw(learning_rate, weight_decay)}
    return _clipped(max_grad_norm, optax.partition(parts, _by_name(_is_hidden_matrix)))


def cosine_decay(learning_rate: float, steps: int, *, warmup: float) -> optax.Schedule:
    """Linear warm-up to the whole rate over the share `warmup` of `steps`, then a cosine to zero."""
    warm = _warm_steps(steps, warmup)
    return _warmed(learning_rate, warm, optax.cosine_decay_schedule(learning_rate, max(1, steps - warm)))


def linear_decay(learning_rate: float, steps: int, *, warmup: float) -> optax.Schedule:
    """Linear warm-up to the whole rate over the share `warmup` of `steps`, then a line to zero."""
    warm = _warm_steps(steps, warmup)
    return _warmed(learning_rate, warm, optax.linear_schedule(learning_rate, 0.0, max(1, steps - warm)))


def constant(learning_rate: float, steps: int, *, warmup: float) -> optax.Schedule:
    """Linear warm-up to the whole rate over the share `warmup` of `steps`, then always the same."""
    return _warmed(learning_rate, _warm_steps(steps, warmup), optax.constant_schedule(learning_rate))


def _adamw(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, b2=0.95, weight_decay=weight_decay, mask=_by_name(_is_decayed))


def _clipped(max_grad_norm: float, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    clipped = optax.chain(_clip_by_global_norm(max_grad_norm), optimizer)

    def in_float32(tree: Any) -> Any:
        return optax.tree.cast(tree, jnp.float32)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return clipped.update(in_float32(grads), state, in_float32(params))

    return optax.GradientTransformation(lambda params: clipped.init(in_float32(params)), update)


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """optax's, but that it multiplies: a quotient with several readers is an array of its own, as large as the
    parameters."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scale = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))
        return jax.tree.map(lambda grad: grad * scale, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _by_name(choose: Any) -> Any:
    """A tree of choose(name of the leaf, leaf)."""

    def chosen(params: Any) -> Any:
        def leaf(path: tuple[Any, ...], param: Array) -> Any:
            return choose(getattr(path[-1], "key", None) if path else None, param)

        return jax.tree_util.tree_map_with_path(leaf, params)

    return chosen


def _is_decayed(name: str | None, param: Array) -> bool:
    """Matrices; scanned layers stack norms and biases into what looks like one."""
    return param.ndim > 1 and name not in NORMS_AND_BIASES


def _is_hidden_matrix(name: str | None, param: Array) -> str:
    return "matrix" if name == "kernel" and param.ndim > 1 else "other"


def _warm_steps(steps: int, warmup: float) -> int:
    return max(1, int(warmup * steps)) if warmup else 0


def _warmed(learning_rate: float, warm: int, schedule: optax.Schedule) -> optax.Schedule:
    """The schedule after `warm` steps of rates (step + 1) / warm: no step is lost on a rate of 0."""
    if not warm:
        return schedule
    return optax.join_schedules([lambda step: learning_rate * (step + 1) / warm, schedule], [warm])
