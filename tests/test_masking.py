import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.masking import constant_mean, masked_mean, masked_sum, masked_whiten, sequence_mean

RNG = np.random.default_rng(0)
MASK = RNG.random((3, 5)) < 0.6
MASK[1] = False
X = RNG.normal(size=(3, 5)).astype(np.float32)
POISONS = pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
def test_as_numpy_does_it(axis):
    expected = np.ma.array(X, mask=~MASK)
    total = np.ma.filled(expected.sum(axis), 0)
    assert_allclose(masked_sum(jnp.asarray(X), jnp.asarray(MASK), axis), total, rtol=1e-5)
    mean = np.ma.filled(expected.mean(axis), 0)
    assert_allclose(masked_mean(jnp.asarray(X), jnp.asarray(MASK), axis), mean, rtol=1e-5)


def test_the_mean_of_half_precision_is_taken_in_float32():
    # Integers above 2048 are not all float16s.
    assert masked_mean(jnp.ones(4099, jnp.float16), jnp.ones(4099, bool)) == 1


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_equals_the_loop(shift_mean):
    whitened = masked_whiten(jnp.asarray(X), jnp.asarray(MASK), shift_mean=shift_mean)
    assert_allclose(whitened, oracles.whiten(X, MASK, shift_mean), rtol=1e-4, atol=1e-6)


def test_whiten_by_hand():
    x, mask = jnp.asarray([[1.0, 3.0, 99.0]]), jnp.asarray([[True, True, False]])
    assert_allclose(masked_whiten(x, mask), [[-1.0, 1.0, 0.0]], rtol=1e-6)
    assert_allclose(masked_whiten(x, mask, shift_mean=False), [[1.0, 3.0, 0.0]], rtol=1e-6)
    assert_array_equal(masked_whiten(jnp.full((1, 3), 2.0), mask), [[0.0, 0.0, 0.0]])


@POISONS
@pytest.mark.parametrize("f", [masked_sum, masked_mean, masked_whiten])
def test_padding_is_never_read(f, poison):
    weights = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)

    def weighted(x):
        return (f(x, jnp.asarray(MASK)) * weights).sum()

    actual = jax.value_and_grad(weighted)(jnp.where(MASK, X, poison))
    jax.tree.map(assert_array_equal, actual, jax.value_and_grad(weighted)(jnp.asarray(X)))
    assert_array_equal(np.asarray(actual[1])[~MASK], 0.0)


@pytest.mark.parametrize("f", [masked_sum, masked_mean, masked_whiten])
def test_nothing_unmasked_is_zero(f):
    nothing = jnp.zeros(X.shape, bool)
    value, grads = jax.value_and_grad(lambda x: f(x, nothing).sum())(jnp.full(X.shape, jnp.nan))
    assert value == 0
    assert_array_equal(grads, np.zeros(X.shape))


def test_gradients():
    with jax.enable_x64(True):
        for f in (masked_mean, masked_whiten):
            check_grads(lambda x, f=f: f(jnp.asarray(x), jnp.asarray(MASK)), (X.astype(float),), 1, ["rev"])


def test_averages_of_sequences_by_hand():
    x = jnp.asarray([[1.0, 3.0, jnp.nan, jnp.nan], [5.0, jnp.nan, jnp.nan, jnp.nan], [jnp.nan] * 4])
    mask = jnp.asarray([[True, True, False, False], [True, False, False, False], [False] * 4])
    assert masked_mean(x, mask) == 3.0
    assert sequence_mean(x, mask) == (2.0 + 5.0) / 2  # the empty row does not count
    assert constant_mean(x, mask, length=5) == pytest.approx(9.0 / (3 * 5))  # here it does
    assert sequence_mean(x, ~mask & False) == constant_mean(x, ~mask & False, length=4) == 0.0
