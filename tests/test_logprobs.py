import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import logprobs as logprobs_module
from rlhf_jax.logprobs import (
    chunked_logprobs,
    chunked_logprobs_and_entropy,
    chunked_weighted_logprobs,
    sequence_logprobs,
    token_entropy,
    token_logprobs,
)

RNG = np.random.default_rng(0)
B, T, D, V = 2, 7, 5, 11
LOGITS = RNG.normal(0, 3, (B, T, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T))
HIDDEN = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(D, V)), jnp.float32)
WEIGHTS = RNG.normal(size=(2, B, T)).astype(np.float32)


def test_by_hand():
    logits = jnp.log(jnp.asarray([[1.0, 2.0, 5.0]])) + 7.0
    assert_allclose(token_logprobs(logits, jnp.asarray([2])), [math.log(5 / 8)], rtol=1e-5)
    assert_allclose(token_entropy(jnp.zeros((1, 4))), [math.log(4)], rtol=1e-6)
    assert_allclose(sequence_logprobs(jnp.asarray([[-1.0, -2.0, jnp.nan]]), jnp.asarray([[True, True, False]])), [-3])


def test_equal_the_loops():
    targets = jnp.asarray(TARGETS)
    expected = oracles.token_logprobs(LOGITS, TARGETS)
    assert_allclose(token_logprobs(jnp.asarray(LOGITS), targets), expected, rtol=1e-5, atol=1e-6)
    assert_allclose(token_entropy(jnp.asarray(LOGITS)), oracles.token_entropy(LOGITS), rtol=1e-5, atol=1e-6)


def test_entropy_is_the_expectation_of_minus_the_logprob():
    row = jnp.asarray(LOGITS[0, :1])
    logprobs = token_logprobs(jnp.broadcast_to(row, (V, V)), jnp.arange(V))
    assert_allclose(-(jnp.exp(logprobs) * logprobs).sum(), token_entropy(row)[0], rtol=1e-5)


def test_a_forbidden_token_counts_for_nothing():
    logits = jnp.asarray([[0.0, 0.0, -jnp.inf]])
    value, grads = jax.value_and_grad(lambda x: token_entropy(x).sum())(logits)
    assert_allclose(value, math.log(2), rtol=1e-6)
    assert_allclose(grads, np.zeros((1, 3)), atol=1e-6)


def test_half_precision_is_scored_in_single():
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    assert token_logprobs(half, jnp.asarray(TARGETS)).dtype == token_entropy(half).dtype == jnp.float32


def test_gradients():
    targets, logits = jnp.asarray(TARGETS), jnp.asarray(LOGITS / 3)
    check_grads(lambda x: token_logprobs(jnp.asarray(x), targets), (logits,), 1, ["rev"], atol=0.02, rtol=0.02)
    check_grads(lambda x: token_entropy(jnp.asarray(x)), (logits,), 1, ["rev"], atol=0.02, rtol=0.02)


def whole(hidden, kernel, targets, softcap=None, temperature=1.0):
    logits = hidden @ kernel
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits / temperature
    return token_logprobs(logits, targets), token_entropy(logits)


def weighted(f):
    """A scalar whose gradient sees every output differently."""

    def loss(hidden, kernel, targets):
        outputs = f(hidden, kernel, targets)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((weight * out).sum() for weight, out in zip(WEIGHTS, outputs, strict=False)), outputs

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize(
    "chunk_size, options",
    [(1, {}), (3, {}), (7, {}), (100, {}), (3, {"softcap": 1.5, "temperature": 0.7}), (7, {"softcap": 1.5})],
)
@pytest.mark.parametrize("f", [chunked_logprobs, chunked_logprobs_and_entropy])
def test_chunks_are_exact(f, chunk_size, options):
    def full(*args):
        return whole(*args, **options)[:1] if f is chunked_logprobs else whole(*args, **options)

    def chunked(*args):
        return f(*args, chunk_size=chunk_size, **options)

    args = HIDDEN, KERNEL, jnp.asarray(TARGETS)
    jax.tree.map(
        lambda a, e: assert_allclose(a, e, rtol=1e-4, atol=1e-5), weighted(chunked)(*args), weighted(full)(*args)
    )


MASK = np.asarray([[0, 1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0, 1]], bool)  # holes; 3 and 5 of 7


@pytest.mark.parametrize("mask", [MASK, MASK & False, MASK | True, MASK & [[True], [False]]])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
@pytest.mark.parametrize("f", [chunked_logprobs, chunked_logprobs_and_entropy])
def test_masked_chunks_are_exact_and_zero_elsewhere(f, chunk_size, mask):
    def full(hidden, kernel, targets):
        return tuple(
            jnp.where(mask, x, 0.0) for x in whole(hidden, kernel, targets)[: 1 if f is chunked_logprobs else 2]
        )

    def chunked(*args):
        return f(*args, chunk_size=chunk_size, mask=jnp.asarray(mask))

    garbage = jnp.where(mask[:, :, None], HIDDEN, jnp.nan)
    targets = jnp.where(mask, TARGETS, 10**6)
    got = weighted(chunked)(garbage, KERNEL, targets)
    expected = weighted(full)(HIDDEN, KERNEL, jnp.asarray(TARGETS))
    jax.tree.map(lambda a, e: assert_allclose(a, e, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("mask", [MASK, MASK & False, MASK | True])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_weighted_chunks_are_exact(chunk_size, mask):
    """Value and gradients, also of the weights, scaled by what comes back from the rest of a loss."""

    def chunked(hidden, kernel, weights):
        targets = jnp.where(mask, TARGETS, 10**6)
        hidden = jnp.where(mask[:, :, None], hidden, jnp.nan)
        return jnp.tanh(
            chunked_weighted_logprobs(hidden, kernel, targets, weights, jnp.asarray(mask), chunk_size=chunk_size) / 50
        )

    def full(hidden, kernel, weights):
        logprobs, _ = whole(hidden, kernel, jnp.asarray(TARGETS))
        return jnp.tanh(jnp.where(mask, weights * logprobs, 0.0).sum() / 50)

    args = HIDDEN, KERNEL, jnp.asarray(WEIGHTS[0])
    got, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*args) for f in (chunked, full))
    jax.tree.map(lambda a, e: assert_allclose(a, e, rtol=1e-4, atol=1e-6), got, expected)
    assert_allclose(jax.jit(chunked)(*args), expected[0], rtol=1e-5)


def test_the_gradient_in_half_precision_does_not_worsen_with_the_number_of_chunks():
    length = 256
    hidden = jnp.asarray(RNG.normal(size=(B, length, D)), jnp.bfloat16)
    targets = jnp.asarray(RNG.integers(0, 3, (B, length)))
    kernel = KERNEL.astype(jnp.bfloat16)

    def error(chunk_size):
        grad = jax.grad(lambda k: chunked_logprobs(hidden, k, targets, chunk_size=chunk_size).mean())(kernel)
        assert grad.dtype == jnp.bfloat16
        return jnp.linalg.norm(grad.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)

    exact = jax.grad(lambda k: whole(hidden.astype(jnp.float32), k, targets)[0].mean())(kernel.astype(jnp.float32))
    assert error(2) < 2 * error(length) < 0.01


@pytest.mark.parametrize("f", [chunked_logprobs, chunked_logprobs_and_entropy])
def test_a_chunk_of_nothing_is_an_error(f):
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        f(HIDDEN, KERNEL, jnp.asarray(TARGETS), chunk_size=0)


def sizes(f) -> set[int]:
    """How many elements the arrays of the compiled forward and backward pass have."""
    args = jnp.zeros((3, 64, 8)), jnp.zeros((8, 509)), jnp.zeros((3, 64), int)

    def loss(hidden, kernel, targets):
        return sum(jnp.sum(x) for x in jax.tree.leaves(f(hidden, kernel, targets)))

    text = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)
    return {math.prod(int(n) for n in shape.split(",")) for shape in shapes}


def test_chunks_never_hold_all_logits():
    everything = 3 * 64 * 509
    assert max(sizes(whole)) >= everything
    assert max(sizes(lambda *args: chunked_logprobs(*args, chunk_size=16))) < everything / 3
    assert max(sizes(lambda *args: chunked_logprobs_and_entropy(*args, chunk_size=16))) < everything / 3
    weights = jnp.ones((3, 64))
    assert max(sizes(lambda *a: chunked_weighted_logprobs(*a, weights, weights > 0, chunk_size=16))) < everything / 3


@pytest.mark.parametrize("f", [chunked_logprobs, chunked_logprobs_and_entropy])
@pytest.mark.parametrize("chunk_size, products", [(64, 3), (63, 4)])
def test_the_logits_of_a_single_chunk_are_computed_once(f, chunk_size, products):
    def loss(hidden, kernel):
        return f(hidden, kernel, jnp.zeros((3, 64), int), chunk_size=chunk_size)[0].sum()

    program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.zeros((3, 64, 8)), jnp.zeros((8, 509))))
    assert program.count("dot_general") == products


def test_masked_columns_cost_nothing():
    """The head is a loop over as many chunks as the longest response has, not over the whole sequence."""
    chunks = []

    def score(logits, targets):
        jax.debug.callback(lambda: chunks.append(1))
        return (token_logprobs(logits, targets),)

    mask, targets = jnp.arange(64)[None] < jnp.asarray([[3], [10]]), jnp.zeros((2, 64), int)
    f = jax.jit(lambda h: logprobs_module._chunked(score, 4, None, h, jnp.ones((8, 5)), targets, mask, 1.0)[0].sum())
    jax.grad(f)(jnp.ones((2, 64, 8)))
    jax.effects_barrier()
    assert len(chunks) == 3 + 3  # forward and backward


def test_a_masked_target_out_of_range_gives_no_gradient():
    mask = jnp.asarray([[True, False]])

    def loss(logits):
        return sequence_logprobs(token_logprobs(logits, jnp.asarray([[1, 10**6]])), mask).sum()

    grads = jax.grad(loss)(jnp.zeros((1, 2, 3)))
    assert_array_equal(grads[0, 1], np.zeros(3))
