import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import chi2

from rlhf_jax.sampling.draw import BLOCK, _first, draw, truncate

SIZES = [50, BLOCK, BLOCK + 1, 1000]  # searched in one level, in one, in two with a block almost empty, in two
ENDS = [0.0, 1 - 2**-24]  # 2⁻²⁴ below 1: the largest float32


def logits_of(size, seed=0, std=1.5):
    return np.random.default_rng(seed).normal(0, std, size).astype(np.float32)


def softmax(logits):
    weights = np.exp(np.float64(logits) - np.max(logits))
    return weights / weights.sum()


def drawn(logits, uniform):
    """Tokens and log-probabilities, each row with the same logits."""
    rows = jnp.broadcast_to(jnp.asarray(logits)[None], (len(uniform), len(logits)))
    tokens, logprobs = jax.jit(draw)(rows, jnp.asarray(uniform, jnp.float32))
    return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.parametrize("size", [50, 1000])
def test_frequencies_are_those_of_softmax(size):
    logits, n = logits_of(size), 20_000
    tokens, _ = drawn(logits, jax.random.uniform(jax.random.key(0), (n,)))
    expected = n * softmax(logits)
    # Rare tokens together, so that every cell expects 5 or more.
    cells = np.where(expected >= 5, np.arange(size), size)
    expected = np.bincount(cells, weights=expected, minlength=size + 1)
    counts = np.bincount(cells[tokens], minlength=size + 1)
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert 1e-3 < chi2.sf(statistic, kept.sum() - 1) < 1 - 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_those_of_the_inverse_cdf(size):
    logits = logits_of(size)
    uniform = (np.arange(2_000) + 0.5) / 2_000
    tokens, logprobs = drawn(logits, uniform)
    cdf = np.cumsum(softmax(logits))
    before = np.concatenate([[0], cdf])[tokens]
    assert (uniform < cdf[tokens] + 1e-5).all() and (uniform > before - 1e-5).all()
    assert_allclose(logprobs, np.log(softmax(logits))[tokens], atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_a_token_of_probability_0_is_never_drawn(size, seed):
    rng = np.random.default_rng(seed)
    logits = logits_of(size, seed)
    logits[rng.random(size) < 0.5] = -np.inf
    logits[[0, -1]] = -np.inf
    uniform = np.concatenate([ENDS, rng.random(300)])
    tokens, logprobs = drawn(logits, uniform)
    possible = np.flatnonzero(np.isfinite(logits))
    assert np.isin(tokens, possible).all() and np.isfinite(logprobs).all()
    assert_array_equal(tokens[:2], [possible[0], possible[-1]])


def test_a_point_that_rounding_moved_out_of_its_block_draws_no_token_of_probability_0():
    weights = jnp.asarray([[0.0, 0.5, 0.5, 0.0]] * 2)
    tokens, before = _first(weights, jnp.asarray([-1e-7, 1.0]))
    assert_array_equal(tokens, [1, 2])
    assert_array_equal(before, [0.0, 0.5])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", [0, 1, -2, -1])
def test_the_only_possible_token_is_always_drawn(size, place):
    logits = np.full(size, -np.inf, np.float32)
    logits[place] = -7.0
    tokens, logprobs = drawn(logits, [*ENDS, 0.5])
    assert_array_equal(tokens, [place % size] * 3)
    assert_allclose(logprobs, 0.0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_large_and_shifted_logits(size):
    logits = logits_of(size, std=40.0) + 1e4
    uniform = [*ENDS, *np.linspace(0.01, 0.99, 50)]
    tokens, logprobs = drawn(logits, uniform)
    assert ((tokens >= 0) & (tokens < size)).all()
    assert_allclose(logprobs, (np.float64(logits) - logits.max())[tokens] - np.log(
        np.exp(np.float64(logits) - logits.max()).sum()), atol=1e-3)  # fmt: skip


def truncated(logits, top_k, top_p):
    """Row by row, from the definition; distinct logits."""
    out = np.full_like(logits, -np.inf)
    for row, kept in zip(logits, out, strict=True):
        order = np.argsort(-row)[:top_k]
        if top_p is not None:
            probs, total, nucleus = softmax(row[order]), 0.0, []
            for token, p in zip(order, probs, strict=True):
                nucleus.append(token)
                total += p
                if total >= top_p:
                    break
            order = np.array(nucleus)
        kept[order] = row[order]
    return out


@pytest.mark.parametrize("top_k", [None, 1, 5, 40, 100])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9, 1.0])
def test_truncate_keeps_what_its_definition_keeps(top_k, top_p):
    logits = np.stack([logits_of(40, seed) for seed in range(6)])
    kept = truncate(jnp.asarray(logits), top_k=top_k, top_p=None if top_p is None else jnp.asarray(top_p))
    assert_array_equal(kept, truncated(logits, top_k, top_p))


def test_the_nucleus_is_the_smallest_set_of_at_least_top_p():
    logits = jnp.log(jnp.asarray([[0.125, 0.5, 0.25, 0.125]]))

    def kept(top_p):
        return np.isfinite(truncate(logits, top_k=None, top_p=jnp.asarray(top_p)))[0].tolist()

    assert kept(0.4) == [False, True, False, False]
    assert kept(0.6) == [False, True, True, False]
    assert kept(0.8) == [True, True, True, True]  # the tie stays in


@pytest.mark.parametrize("seed", range(3))
def test_a_nucleus_of_everything_keeps_everything(seed):
    # The running sum of 700 float32 probabilities is 1 before its end.
    logits = jnp.asarray(logits_of(700, seed, std=4.0))[None]
    assert jnp.isfinite(truncate(logits, top_k=None, top_p=jnp.asarray(1.0))).all()


def test_ties_at_the_edge_of_top_k_stay_in():
    logits = jnp.asarray([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = truncate(logits, top_k=2, top_p=None)
    assert_array_equal(np.isfinite(kept), [[False, True, True, True, False]])
