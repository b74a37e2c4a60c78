import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_jax.diagnostics import (
    best_of_n_fit,
    collapsed,
    distinct_n,
    duplicate_share,
    explained_variance,
    gao_fit,
    length_statistics,
)


def test_explained_variance_by_hand_under_a_mask():
    returns = jnp.array([[1.0, 3.0, 5.0, jnp.nan]])
    values = jnp.array([[2.0, 3.0, 4.0, jnp.inf]])
    mask = jnp.array([[True, True, True, False]])
    # Var(returns) = 8/3, residuals -1, 0, 1: variance 2/3.
    assert_allclose(explained_variance(values, returns, mask), 1 - 2 / 8, rtol=1e-6)
    # A constant offset is no variance; a constant explains none.
    assert_allclose(explained_variance(returns + 7.0, returns, mask), 1.0, rtol=1e-6)
    assert_allclose(explained_variance(jnp.full_like(returns, 9.0), returns, mask), 0.0, atol=1e-6)
    assert explained_variance(-returns, returns, mask) < -2.9
    assert jax.jit(explained_variance)(values, jnp.ones_like(values), mask) == 0.0
    assert explained_variance(values, returns, jnp.zeros_like(mask)) == 0.0


def test_gao_fit_finds_the_curve_it_was_given():
    kl = np.linspace(0, 60, 40)
    d = np.sqrt(kl)
    reward = np.array([x * (1.2 - 0.45 * np.log(x)) if x else 0.0 for x in d])
    fit = gao_fit(kl, reward)
    assert_allclose([fit.alpha, fit.beta, fit.r2], [1.2, 0.45, 1.0], atol=1e-9)
    assert_allclose(fit(kl), reward, atol=1e-9)
    grid = np.linspace(1, 60, 100_000)
    assert_allclose(fit.peak_kl, grid[np.argmax(fit(grid))], rtol=1e-3)


def test_the_fit_of_the_best_of_n_finds_its_curve():
    kl = np.array([0.0, 0.2, 0.6, 1.2, 1.8, 3.0])
    d = np.sqrt(kl)
    fit = best_of_n_fit(kl, d * (1.5 - 0.4 * d))
    np.testing.assert_allclose([fit.alpha, fit.beta, fit.r2], [1.5, 0.4, 1.0], rtol=1e-9)
    np.testing.assert_allclose(fit([4.0]), [2 * (1.5 - 0.8)])
    with pytest.raises(ValueError, match="at least 3 finite points"):
        best_of_n_fit([0.0, 1.0], [0.0, 1.0])


def test_gao_fit_by_hand_and_its_r2():
    # At d = 1 and e the features are (1, 0) and (e, -e): least squares through (1, 2) twice and (e, e).
    fit = gao_fit([1.0, 1.0, np.e**2], [1.5, 2.5, np.e])
    assert_allclose([fit.alpha, fit.beta], [2.0, 1.0], atol=1e-9)
    rewards = np.array([1.5, 2.5, np.e])
    assert_allclose(fit.r2, 1 - 0.5 / np.sum((rewards - rewards.mean()) ** 2))


def test_gao_fit_passes_over_what_is_not_finite_and_refuses_too_little():
    noisy = gao_fit([1.0, 4.0, 9.0, np.nan, 2.0, -0.1], [1.0, 2.0, 3.0, 1.0, np.inf, 0.0])
    assert_allclose([noisy.alpha, noisy.beta], [1.0, 0.0], atol=1e-9)
    assert noisy.peak_kl == np.inf
    with pytest.raises(ValueError, match="at least 3"):
        gao_fit([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])


def test_distinct_and_duplicates():
    texts = ["a b a b".split(), "a b".split(), "c".split()]
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 2 / 4  # ab, ba, ab, ab
    assert distinct_n(texts, 5) == 0.0
    assert duplicate_share(["ab", "ab", "ab", "c"]) == 0.5
    assert duplicate_share([]) == 0.0


def test_length_statistics():
    lengths = length_statistics([1, 2, 3, 4], [2.0, 4.0, 6.0, 8.0])
    assert_allclose(lengths, [2.5, 3.85, 1.0])
    assert length_statistics([1, 2, 3], [3, 2, 1]).correlation == pytest.approx(-1)
    assert length_statistics([2, 2], [1, 5]).correlation == 0.0


@pytest.mark.parametrize(
    ("entropy", "duplicates", "why"),
    [(1.0, 0.1, None), (0.19, 0.1, "entropy"), (np.nan, 0.1, "entropy"), (1.0, 0.7, "70% of responses")],
)
def test_collapse(entropy, duplicates, why):
    reason = collapsed(entropy, 1.0, duplicates, 0.05, entropy_share=0.2, duplicate_rise=0.5)
    assert reason is None if why is None else why in reason
