"""Log-probabilities of tokens, and entropy, from logits or straight from hidden states."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from rlhf_jax.arrays import check_leading, check_shapes
from rlhf_jax.axes import constrain, parts
from rlhf_jax.masking import masked_sum
from rlhf_jax.types import ScalarLike


def token_logprobs(logits: Float[Array, "*shape V"], targets: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log π(target): float32 log-softmax of the logits, at the target.

    Raises ValueError unless there is one target for each distribution.
    """
    check_leading({"targets": targets}, {"logits": logits}, axes=-1)
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
    mask: Bool[Array, "B T"] | None = None,
    softcap: float | None = None,
    temperature: ScalarLike = 1.0,
) -> Float[Array, "B T"]:
    """`token_logprobs(hidden @ head_kernel, targets)` with the logits of only `chunk_size` columns in memory.

    Exact in value and in gradient: each chunk's logits are computed again in the backward pass, so that no
    [B, T, V] array exists in either. Where there is one chunk its logits are kept instead: three matrix products, not
    four, in the same memory. Chunks run along T, so that rows may stay sharded. With a mask, each row's masked entries
    are 0 and, in several chunks, not computed (as many as in the row, or part of one, that has fewest). The logits go
    through `soft_cap`, then are divided by the temperature, which gets no gradient; jax.grad and vjp work, jvp and
    jacfwd do not. Raises ValueError if chunk_size is not positive, or for targets or a mask of another shape.
    """
    return _scored(_logprobs, chunk_size, softcap, hidden, head_kernel, targets, mask, temperature)[0]


def chunked_logprobs_and_entropy(
    hidden: Float[Array, "B T D"],
    head_kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk_size: int,
    mask: Bool[Array, "B T"] | None = None,
    softcap: float | None = None,
    temperature: ScalarLike = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target, as `chunked_logprobs` has it, and the entropy of each distribution."""
    scores = _scored(_logprobs_and_entropy, chunk_size, softcap, hidden, head_kernel, targets, mask, temperature)
    return scores[0], scores[1]


def chunked_weighted_logprobs(
    hidden: Float[Array, "B T D"],
    head_kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    chunk_size: int,
    softcap: float | None = None,
) -> Float[Array, ""]:
    """Σ w log π(target) over the mask, as `(weights * chunked_logprobs(...)).sum()`, for weights known beforehand.

    The gradient is then known up to a factor as soon as a chunk's logits are, so that they are computed once: three
    matrix products instead of four. Without differentiation only the sum is computed.
    """
    _check(hidden, targets, mask)
    check_shapes({"targets": targets, "weights": weights})
    hidden, targets, weights, mask = map(_pieces, (hidden, targets, weights, mask))
    return _weighted(chunk_size, softcap, hidden, _spread(head_kernel, len(targets)), targets, weights, mask)


def _check(hidden: Array, targets: Array, mask: Array | None) -> None:
    check_shapes({"targets": targets} if mask is None else {"targets": targets, "mask": mask}, rank=2)
    check_leading({"targets": targets}, {"hidden": hidden}, axes=-1)


@jax.custom_vjp
def _logprobs(logits: Array, targets: Array) -> tuple[Array, ...]:
    return (_chosen(logits, targets) - jax.nn.logsumexp(logits, axis=-1),)


def _logprobs_forward(logits: Array, targets: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    lse = jax.nn.logsumexp(logits, axis=-1)
    return (_chosen(logits, targets) - lse,), (logits, targets, lse)


def _logprobs_backward(residuals: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, None]:
    logits, targets, lse = residuals
    cotangent = cotangents[0][..., None]
    return jnp.where(_is_target(logits, targets), cotangent, 0.0) - cotangent * jnp.exp(logits - lse[..., None]), None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


@jax.custom_vjp
def _logprobs_and_entropy(logits: Array, targets: Array) -> tuple[Array, ...]:
    lse, entropy = _lse_and_entropy(logits)
    return _chosen(logits, targets) - lse, entropy


def _scores_forward(logits: Array, targets: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    lse, entropy = _lse_and_entropy(logits)
    return (_chosen(logits, targets) - lse, entropy), (logits, targets, lse, entropy)


def _scores_backward(residuals: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, None]:
    """∂ log π(t) = 1ₜ − π, ∂H = −π (log π + H)."""
    logits, targets, lse, entropy = residuals
    of_logprob, of_entropy = (cotangent[..., None] for cotangent in cotangents)
    logprobs = logits - lse[..., None]
    slope = of_logprob + of_entropy * (logprobs + entropy[..., None])
    return jnp.where(_is_target(logits, targets), of_logprob, 0.0) - slope * jnp.exp(logprobs), None


_logprobs_and_entropy.defvjp(_scores_forward, _scores_backward)


def _lse_and_entropy(logits: Array) -> tuple[Array, Array]:
    """log Σᵥ exp(xᵥ) and the entropy, of finite logits.

    H = log z − Σᵥ exp(yᵥ) yᵥ / z,   yᵥ = xᵥ − max x,   z = Σᵥ exp(yᵥ)
    """
    largest = logits.max(axis=-1, keepdims=True)
    total = jnp.exp(logits - largest).sum(axis=-1)
    # Both sums in one loop, or a choice in it, take a CPU longer than two loops.
    logits, largest, total = jax.lax.optimization_barrier((logits, largest, total))
    below = logits - largest
    moment = (jnp.exp(below) * below).sum(axis=-1)
    return largest[..., 0] + jnp.log(total), jnp.log(total) - moment / total


def _chosen(logits: Array, targets: Array) -> Array:
    """Each distribution's entry at the target."""
    if parts(len(logits), "piece") * parts(logits.shape[-1], "vocab") == 1:
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(_is_target(logits, targets), logits, 0.0).sum(axis=-1)  # logits that are cut stay where they are


def _is_target(logits: Array, targets: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]


def _spread(kernel: Array, rows: int) -> Array:
    """Where the rows are cut over a mesh, a kernel for each part of them, [parts, D, V], which costs no memory.

    Each part sums its own gradient over the chunks, and all are added up once, as the broadcast's gradient.
    """
    copies = parts(rows, "piece")
    if copies == 1:
        return kernel
    return constrain(jnp.broadcast_to(kernel[None], (copies, *kernel.shape)), "piece", None, "vocab")


def _pieces(x: Array) -> Array:
    """[B, T, …] as [pieces · B, T/pieces, …] where the mesh cuts sequences: each device has what it had, as rows."""
    times = parts(x.shape[1], "time")
    if times == 1:
        return x
    cut = x.reshape(len(x), times, -1, *x.shape[2:]).swapaxes(0, 1)
    return constrain(cut.reshape(times * len(x), *cut.shape[2:]), "piece")


def _joined(x: Array, length: int) -> Array:
    """The inverse of `_pieces`, of arrays [rows, columns]."""
    if x.shape[1] == length:
        return x
    joined = x.reshape(length // x.shape[1], -1, x.shape[1]).swapaxes(0, 1).reshape(-1, length)
    return constrain(joined, "batch", "time")


def _logits(hidden: Array, kernel: Array, softcap: float | None) -> Array:
    # Flat rows: XLA's CPU backend contracts two leading axes at half the speed in the backward pass.
    rows, length, width = hidden.shape
    flat = hidden.reshape(*kernel.shape[:-2], -1, width)
    logits = jnp.matmul(flat, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return soft_cap(logits.reshape(rows, length, -1), softcap)


class _Columns:
    """Cuts [B, T, …] arrays into chunks of columns, each row's unmasked entries first."""

    def __init__(self, mask: Array | None, shape: tuple[int, ...], chunk_size: int):
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        self.mask, self.rows, self.length = mask, shape[0], shape[1]
        self.size = min(chunk_size, self.length)
        self.padded = self.length + -self.length % self.size
        if mask is None:
            self.chunks: Any = self.padded // self.size
        else:
            self.order = jnp.argsort(~mask, axis=1, stable=True)
            self.back = jnp.argsort(self.order, axis=1)
            self.chunks = -(-mask.sum(axis=1).max() // self.size)

    def pack(self, x: Array) -> Array:
        """[B, T, …] -> [B, padded T, …], 0 where masked."""
        shape = (self.rows, self.length) + (1,) * (x.ndim - 2)
        if self.mask is not None:
            x = jnp.where(self.mask.reshape(shape), x, jnp.zeros_like(x))
            x = jnp.take_along_axis(x, self.order.reshape(shape), axis=1)
        return jnp.pad(x, [(0, 0), (0, self.padded - self.length), *[(0, 0)] * (x.ndim - 2)])

    def unpack(self, x: Array) -> Array:
        """The inverse: 0 where masked."""
        x = x[:, : self.length]
        if self.mask is None:
            return x
        shape = (self.rows, self.length) + (1,) * (x.ndim - 2)
        x = jnp.take_along_axis(x, self.back.reshape(shape), axis=1)
        return jnp.where(self.mask.reshape(shape), x, jnp.zeros_like(x))

    def loop(self, body: Callable[[Callable[[Array], Array], Callable[[Array, Array], Array], Any], Any], carry: Any):
        """carry = body(cut, paste, carry) for each chunk; cut(x) is the chunk of x, paste(x, chunk) writes it."""

        def step(i: Array, carry: Any) -> Any:
            def cut(x: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis=1)

            def paste(x: Array, chunk: Array) -> Array:
                return jax.lax.dynamic_update_slice_in_dim(x, chunk.astype(x.dtype), i * self.size, axis=1)

            return body(cut, paste, carry)

        return jax.lax.fori_loop(0, self.chunks, step, carry)


Score = Callable[[Array, Array], tuple[Array, ...]]


def _scored(
    score: Score,
    chunk_size: int,
    softcap: float | None,
    hidden: Array,
    kernel: Array,
    targets: Array,
    mask: Array | None,
    temperature: ScalarLike,
) -> tuple[Array, ...]:
    _check(hidden, targets, mask)
    length = targets.shape[1]
    hidden, targets = _pieces(hidden), _pieces(targets)
    mask = None if mask is None else _pieces(mask)
    kernel = _spread(kernel, len(targets))
    if targets.shape[1] > chunk_size:
        found = _chunked(score, chunk_size, softcap, hidden, kernel, targets, mask, temperature)
    else:
        if mask is not None:
            hidden, targets = jnp.where(mask[:, :, None], hidden, jnp.zeros_like(hidden)), jnp.where(mask, targets, 0)
        if isinstance(temperature, Array):
            temperature = jax.lax.stop_gradient(temperature)
        found = score(_logits(hidden, kernel, softcap) / temperature, targets)
        found = found if mask is None else tuple(jnp.where(mask, x, 0.0) for x in found)
    return tuple(_joined(x, length) for x in found)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(
    score: Score,
    chunk_size: int,
    softcap: float | None,
    hidden: Array,
    kernel: Array,
    targets: Array,
    mask: Array | None,
    temperature: ScalarLike,
) -> tuple[Array, ...]:
    columns = _Columns(mask, targets.shape, chunk_size)
    packed, packed_targets = columns.pack(hidden), columns.pack(targets)

    def body(cut: Any, paste: Any, out: tuple[Array, ...]) -> tuple[Array, ...]:
        logits = _logits(cut(packed), kernel, softcap) / temperature
        return tuple(map(paste, out, score(logits, cut(packed_targets))))

    count = len(
        jax.eval_shape(score, jax.ShapeDtypeStruct((1, 1), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32))
    )
    empty = jnp.zeros(packed_targets.shape, jnp.float32)
    return tuple(map(columns.unpack, columns.loop(body, (empty,) * count)))


def _chunked_forward(
    score: Score, chunk_size: int, softcap: float | None, *args: Any
) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    return _chunked(score, chunk_size, softcap, *args), args


def _chunked_backward(
    score: Score, chunk_size: int, softcap: float | None, args: Any, cotangents: tuple[Array, ...]
) -> tuple[Any, ...]:
    hidden, kernel, targets, mask, temperature = args
    columns = _Columns(mask, targets.shape, chunk_size)
    packed, packed_targets = columns.pack(hidden), columns.pack(targets)
    packed_cotangents = tuple(map(columns.pack, cotangents))

    def body(cut: Any, paste: Any, grads: tuple[Array, Array]) -> tuple[Array, Array]:
        def scores(hidden: Array, kernel: Array) -> tuple[Array, ...]:
            return score(_logits(hidden, kernel, softcap) / temperature, cut(packed_targets))

        _, pull = jax.vjp(scores, cut(packed), kernel)
        hidden_grad, kernel_grad = pull(tuple(map(cut, packed_cotangents)))
        return paste(grads[0], hidden_grad), grads[1] + kernel_grad

    # The kernel's gradient is a sum over chunks: in half precision its error would grow with their number.
    start = jnp.zeros(packed.shape, jnp.float32), jnp.zeros(kernel.shape, jnp.float32)
    hidden_grad, kernel_grad = columns.loop(body, start)
    return columns.unpack(hidden_grad).astype(hidden.dtype), kernel_grad.astype(kernel.dtype), None, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted(
    chunk_size: int,
    softcap: float | None,
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    mask: Array,
) -> Float[Array, ""]:
    return masked_sum(weights * _chunked(_logprobs, chunk_size, softcap, hidden, kernel, targets, mask, 1.0)[0], mask)


def _weighted_forward(
    chunk_size: int,
    softcap: float | None,
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    mask: Array,
) -> tuple[Array, tuple[Array, ...]]:
    columns = _Columns(mask, targets.shape, chunk_size)
    packed, packed_targets, packed_weights = map(columns.pack, (hidden, targets, weights))

    def body(cut: Any, paste: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        def total(hidden: Array, kernel: Array) -> tuple[Array, Array]:
            (logprobs,) = _logprobs(_logits(hidden, kernel, softcap), cut(packed_targets))
            return (cut(packed_weights) * logprobs).sum(), logprobs

        (hidden_grad, kernel_grad), logprobs = jax.grad(total, argnums=(0, 1), has_aux=True)(cut(packed), kernel)
        return paste(carry[0], hidden_grad), carry[1] + kernel_grad, paste(carry[2], logprobs)

    start = (
        jnp.zeros(packed.shape, jnp.float32),
        jnp.zeros(kernel.shape, jnp.float32),
        jnp.zeros(packed_targets.shape, jnp.float32),
    )
    hidden_grad, kernel_grad, logprobs = columns.loop(body, start)
    logprobs = columns.unpack(logprobs)
    grads = columns.unpack(hidden_grad).astype(hidden.dtype), kernel_grad.astype(kernel.dtype), logprobs
    return (jnp.where(mask, weights, 0.0) * logprobs).sum(), grads


def _weighted_backward(
    chunk_size: int, softcap: float | None, grads: tuple[Array, ...], cotangent: Array
) -> tuple[Any, ...]:
    hidden_grad, kernel_grad, logprobs = (g * cotangent.astype(g.dtype) for g in grads)
    return hidden_grad, kernel_grad, None, logprobs, None


_weighted.defvjp(_weighted_forward, _weighted_backward)
