import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.kl import adaptive_beta, kl_exact, kl_k1, kl_k2, kl_k3, kl_shaped_rewards

RNG = np.random.default_rng(0)
V = 6
LOGITS = jnp.asarray(RNG.normal(size=(2, 3, V)), jnp.float32)
REF_LOGITS = jnp.asarray(RNG.normal(size=(2, 3, V)), jnp.float32)


def every_token(logits):
    """The log-probability of each token of the vocabulary at one step, as [1, V]."""
    return jax.nn.log_softmax(logits[0, 0])[None]


def test_by_hand():
    # π = 2 π_ref.
    args = jnp.asarray([[math.log(0.5)]]), jnp.asarray([[math.log(0.25)]])
    assert_allclose(kl_k1(*args), [[math.log(2)]], rtol=1e-5)
    assert_allclose(kl_k2(*args), [[math.log(2) ** 2 / 2]], rtol=1e-5)
    assert_allclose(kl_k3(*args), [[math.log(2) - 0.5]], rtol=1e-5)
    half_of_two = jnp.log(jnp.asarray([[[0.5, 0.5]]])), jnp.log(jnp.asarray([[[0.25, 0.75]]]))
    assert_allclose(kl_exact(*half_of_two), [[0.5 * math.log(4 / 3)]], rtol=1e-5)


def test_exact_equals_the_loop():
    expected = oracles.kl_exact(np.asarray(LOGITS), np.asarray(REF_LOGITS))
    assert_allclose(kl_exact(LOGITS, REF_LOGITS), expected, rtol=1e-5)


def test_none_to_itself():
    for k in (kl_k1, kl_k2, kl_k3):
        assert_array_equal(k(LOGITS[0], LOGITS[0]), np.zeros((3, V)))
    assert_allclose(kl_exact(LOGITS, LOGITS), np.zeros((2, 3)), atol=1e-7)


def test_k2_and_k3_are_never_negative_and_keep_small_numbers():
    small = jnp.asarray([[1e-5, -1e-5, 0.0]])
    for k in (kl_k2, kl_k3):
        value = k(small, jnp.zeros((1, 3)))
        assert np.all(np.asarray(value) >= 0)
        assert_allclose(value, [[5e-11, 5e-11, 0.0]], rtol=0.01)


@pytest.mark.parametrize("k", [kl_k1, kl_k3])
def test_unbiased(k):
    logprobs, ref_logprobs = every_token(LOGITS), every_token(REF_LOGITS)
    expectation = (jnp.exp(logprobs) * k(logprobs, ref_logprobs)).sum()
    assert_allclose(expectation, kl_exact(LOGITS, REF_LOGITS)[0, 0], rtol=1e-5)


def test_expected_gradients():
    """Of E[∇k]: nothing for k₁, ∇KL(π‖π_ref) for k₂, ∇KL(π_ref‖π) for k₃."""
    probs, ref_logprobs = jnp.exp(every_token(LOGITS)), every_token(REF_LOGITS)

    def expected_gradient(k):
        return jax.grad(lambda logits: (probs * k(every_token(logits), ref_logprobs)).sum())(LOGITS)

    forward = jax.grad(lambda logits: kl_exact(logits, REF_LOGITS)[0, 0])(LOGITS)
    backward = jax.grad(lambda logits: kl_exact(REF_LOGITS, logits)[0, 0])(LOGITS)
    for k, expected in ((kl_k1, jnp.zeros_like(LOGITS)), (kl_k2, forward), (kl_k3, backward)):
        assert_allclose(expected_gradient(k), expected, rtol=1e-4, atol=1e-6)


def test_a_token_never_emitted_counts_for_nothing():
    logits, ref_logits = (jnp.asarray([[[0.0, 0.0, -jnp.inf]]]), jnp.asarray([[[0.0, 0.0, -jnp.inf]]]))
    value, grads = jax.value_and_grad(lambda x: kl_exact(x, ref_logits).sum())(logits)
    assert_allclose(value, 0.0, atol=1e-6)
    assert_allclose(grads, np.zeros((1, 1, 3)), atol=1e-6)


N = np.nan
MASK = np.asarray([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
LOGPROBS = np.asarray([[-1.0, -2.0, -3.0, N], [-1.0, N, -2.0, N], [N, N, N, N], [N, N, N, -4.0]], np.float32)
REF_LOGPROBS = np.asarray([[-1.0, -3.0, -1.0, N], [-2.0, N, -2.0, N], [N, N, N, N], [N, N, N, -1.0]], np.float32)
SCORES = np.asarray([10.0, -5.0, N, 2.0], np.float32)


def test_shaped_rewards_by_hand():
    rewards = kl_shaped_rewards(*map(jnp.asarray, (SCORES, LOGPROBS, REF_LOGPROBS, MASK)), beta=0.5)
    expected = [[0.0, -0.5, 11.0, 0.0], [-0.5, 0.0, -5.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.5]]
    assert_allclose(rewards, expected, rtol=1e-6)
    assert_allclose(rewards, oracles.kl_shaped_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, beta=0.5), rtol=1e-6)


def test_shaped_rewards_sum_to_the_objective():
    scores, mask = jnp.asarray([1.0, -2.0]), jnp.ones((2, 3), bool)
    logprobs, ref_logprobs = LOGITS[:, :, 0], REF_LOGITS[:, :, 0]
    total = kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, beta=0.1).sum(axis=1)
    assert_allclose(total, scores - 0.1 * (logprobs - ref_logprobs).sum(axis=1), rtol=1e-5)


def test_no_gradient_through_rewards():
    args = *(jnp.nan_to_num(jnp.asarray(x)) for x in (SCORES, LOGPROBS, REF_LOGPROBS)), jnp.asarray(MASK)
    grads = jax.grad(lambda *xs: kl_shaped_rewards(*xs, args[3], beta=0.5).sum(), argnums=(0, 1, 2))(*args[:3])
    assert not any(np.any(grad) for grad in grads)


@pytest.mark.parametrize(
    "observed, expected",
    [(6.0, 0.1), (12.0, 0.1 * 1.02), (0.0, 0.1 * 0.98), (6.6, 0.1 * 1.01), (-50.0, 0.1 * 0.98)],
)
def test_adaptive_beta_by_hand(observed, expected):
    beta = adaptive_beta(0.1, observed, target_kl=6.0, horizon=10_000, batch_size=1_000)
    assert beta.dtype == jnp.float32
    assert_allclose(beta, expected, rtol=1e-6)
