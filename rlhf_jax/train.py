"""From a loss to a training step: the step, microbatches, and PPO's epochs of minibatches."""

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jaxtyping import Array, PRNGKeyArray

from rlhf_jax.data.tokens import take
from rlhf_jax.models import count_weights
from rlhf_jax.sharding import constrain_params, create
from rlhf_jax.types import Metrics, Params

State = TypeVar("State")
LossFn = Callable[..., tuple[Array | dict[str, Array], Metrics]]
"""loss_fn(params, batch, *fixed) -> (loss, metrics); instead of a loss, a dict of the terms that it is the sum of."""
Counts = Callable[[Any], dict[str, Array]]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # malloc.h


def make_state(model: Any, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A TrainState whose arrays are its own, so that it may be donated while `params` lives on."""

    def start(params: Params) -> TrainState:
        return TrainState.create(apply_fn=model.apply, params=jax.tree.map(jnp.copy, params), tx=optimizer)

    return create(start, params)


def make_train_step(loss_fn: LossFn, *, counts: Counts | None = None) -> Callable[..., tuple[TrainState, Metrics]]:
    """train_step(state, batch, *fixed) -> (state, metrics): one optimiser step, compiled; the state is donated.

    Where the loss or a gradient is not finite the state stays as it was, its `step` too, and metrics["skipped"] is 1.

    With `counts`, `batch` is n `microbatches` of which one at a time is in memory. Their gradients are summed in
    float32, each mean weighted by what it is a mean over, so that the step is that of the whole batch:

        L = Σᵢ Σₖ (nᵢₖ / Σⱼ nⱼₖ) Lᵢₖ,   Lᵢₖ term k of microbatch i, a mean over nᵢₖ things

    counts(microbatch) gives the nᵢₖ by name: "loss", those terms and metrics that are means over something else, and
    under "metrics", perhaps, that of all metrics without a name of their own.
    They must depend on data only. Metrics that are integers are added, those called "…_max" are maxima, and those with
    an axis of rows, [B, …], are laid one microbatch after the other.
    """

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Any, *fixed: Any) -> tuple[TrainState, Metrics]:
        if counts is None:
            gradient = jax.value_and_grad(lambda params: _total(loss_fn(params, batch, *fixed), None), has_aux=True)
            (loss, metrics), grads = gradient(state.params)
        else:
            loss, metrics, grads = _accumulated(loss_fn, counts, state.params, batch, fixed)
        state, metrics = _applied(state, loss, metrics, constrain_params(grads))
        return constrain_params(state), metrics

    return train_step


def make_pmap_step(loss_fn: LossFn, *, counts: Counts) -> Callable[..., tuple[TrainState, Metrics]]:
    """`make_train_step` by `jax.pmap`: for code that has its state replicated, [devices, …], one whole copy a device.

    train_step(state, batch, *fixed), all [devices, …] (`jax.device_put_replicated`, `microbatches`), with metrics of
    the whole batch. A device's gradient and means count by what they are means over, `counts`, so that devices whose
    masks are unequal do not weigh the same.
    """
    devices = "devices"

    @partial(jax.pmap, axis_name=devices, donate_argnums=0)
    def train_step(state: TrainState, batch: Any, *fixed: Any) -> tuple[TrainState, Metrics]:
        add, most = partial(jax.lax.psum, axis_name=devices), partial(jax.lax.pmax, axis_name=devices)
        numbers = counts(batch)
        shares = {name: n / jnp.maximum(add(n), 1).astype(jnp.float32) for name, n in numbers.items()}
        gradient = jax.value_and_grad(lambda params: _total(loss_fn(params, batch, *fixed), shares), has_aux=True)
        (loss, metrics), grads = gradient(state.params)
        loss, grads = add((loss, optax.tree.cast(grads, jnp.float32)))
        metrics = {name: x if x.ndim else _joined(name, x, shares, add, most) for name, x in metrics.items()}
        return _applied(state, loss, metrics, grads)

    return train_step


def microbatches(batch: Any, number: int) -> Any:
    """[n·b, …] arrays as [n, b, …]. Raises ValueError when they do not divide."""

    def cut(x: Any) -> Any:
        if len(x) % number:
            raise ValueError(f"{len(x)} rows do not divide into {number} microbatches")
        return x.reshape(number, -1, *x.shape[1:])

    return jax.tree.map(cut, batch)


def _applied(state: TrainState, loss: Array, metrics: Metrics, grads: Params) -> tuple[TrainState, Metrics]:
    """The optimiser's step, or none where something is not finite.

    A branch updates the donated state in place; to choose between two states afterwards takes copies of the moments on
    a CPU. On a GPU, where the host has to read a branch's condition, it is a choice.
    """
    norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    metrics = {"loss": loss, "grad_norm": norm, "skipped": 1 - finite.astype(jnp.int32), **metrics}

    def step(state: TrainState, grads: Params) -> TrainState:
        return state.apply_gradients(grads=grads)

    if jax.default_backend() == "gpu":
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), step(state, grads), state), metrics
    return jax.lax.cond(finite, step, lambda state, grads: state, state, grads), metrics


def _total(result: tuple[Any, Metrics], shares: dict[str, Array] | None) -> tuple[Array, Metrics]:
    loss, metrics = result
    terms = loss if isinstance(loss, dict) else {"loss": loss}
    first, *others = [term if shares is None else term * shares[name] for name, term in terms.items()]
    return sum(others, first), metrics


def _joined(
    name: str, x: Array, shares: dict[str, Array], add: Callable[[Array], Array], most: Callable[[Array], Array]
) -> Array:
    """A metric of the whole batch from those of its parts."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return add(x)
    return most(x) if name.endswith("_max") else add(x * shares.get(name, shares.get("metrics", shares["loss"])))


def _accumulated(
    loss_fn: LossFn, counts: Counts, params: Params, batches: Any, fixed: tuple[Any, ...]
) -> tuple[Array, Metrics, Params]:
    numbers = jax.vmap(counts)(batches)
    shares = {name: n / jnp.maximum(n.sum(), 1).astype(jnp.float32) for name, n in numbers.items()}

    def add(grads: Params, xs: tuple[Any, dict[str, Array]]) -> tuple[Params, tuple[Array, Metrics]]:
        batch, share = xs
        gradient = jax.value_and_grad(lambda params: _total(loss_fn(params, batch, *fixed), share), has_aux=True)
        result, more = gradient(params)
        return jax.tree.map(jnp.add, grads, more), result

    start = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    grads, (losses, each) = jax.lax.scan(add, start, (batches, shares))

    def whole(name: str, x: Array) -> Array:
        if x.ndim > 1:
            return x.reshape(-1, *x.shape[2:])
        return _joined(name, x, shares, lambda x: x.sum(axis=0), lambda x: x.max(axis=0))

    return losses.sum(), {name: whole(name, x) for name, x in each.items()}, grads


def ppo_update(
    step: Callable[[State, Any], tuple[State, Metrics]],
    state: State,
    experience: Any,
    extra: Any,
    key: PRNGKeyArray,
    *,
    epochs: int,
    minibatches: int,
) -> tuple[State, Metrics]:
    """Several epochs of shuffled minibatches as one lax.scan; returns the metrics of each, [epochs · minibatches].

    Where all rows are one minibatch they stay in their order.
    `experience` is a pytree of arrays [B, …]: PPO's `Experience`, or any other.
    step(state, (minibatch, extra minibatch)) -> (state, metrics). `extra` is a pytree of arrays
    [epochs · minibatches, …] that goes along with the minibatches (pretraining data for PPO-ptx), or None.
    The rows must divide evenly: raises ValueError.
    """
    rows = len(jax.tree.leaves(experience)[0])
    if rows % minibatches:
        raise ValueError(f"{rows} responses cannot be cut into {minibatches} equal minibatches")
    shuffled = [jax.random.permutation(k, rows) for k in jax.random.split(key, epochs)]
    order = jnp.concatenate(shuffled if minibatches > 1 else [jnp.arange(rows)] * epochs)
    order = order.reshape(epochs * minibatches, rows // minibatches)

    def minibatch(state: State, xs: tuple[Array, Any]) -> tuple[State, Metrics]:
        chosen, extra_batch = xs
        return step(state, (take(experience, chosen), extra_batch))

    return jax.lax.scan(minibatch, state, (order, extra))


LARGE = 20_000_000
"""Weights of a model whose freed memory is given back."""


def keep_freed_memory(params: Params | None = None) -> None:
    """Has the C library (glibc) keep what XLA frees, unless `params` are those of a `LARGE` model.

    It gives buffers back to the kernel, which clears them page by page when they are had again: at every step. Of a
    larger model the pieces that are kept do not fit what is asked for next, and the process grows by luck: with 135
    million parameters one step of SFT took 5.2, 7.9 or 9.4 GB, and 3.9 without.
    """
    if params is not None and count_weights(params) >= LARGE:
        return give_back_freed_memory(params)
    _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1})


def give_back_freed_memory(params: Params) -> None:
    """Has glibc give back what XLA frees of a `LARGE` model's buffers, also those of 1 to 32 MB, which it would keep.

    With 135 million parameters the pipeline then took 3.4 GB for 3.9, at the same speed.
    """
    if count_weights(params) >= LARGE:
        _mallopt({M_MMAP_THRESHOLD: 2**20, M_TRIM_THRESHOLD: 2**24, M_ARENA_MAX: 4})


def _mallopt(options: dict[int, int]) -> None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        for option, value in options.items():
            libc.mallopt(option, value)
