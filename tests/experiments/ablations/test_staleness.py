"""Old policies in a ring, and the weights of their answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.ablations.staleness import WEIGHTS, Config, Variant, before, kept_policies, put, variants, weighted
from rlhf_jax.batches import Completions, Experience, Tokens
from rlhf_jax.errors import UserError


@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_policy_of_k_steps_before_samples_and_the_first_one_until_it_is_there(k):
    def step(carry, number):
        params, ring = carry
        ring = put(ring, params, number)
        return ({"w": params["w"] + 1}, ring), before(ring, number, jnp.int32(k))["w"]

    start = {"w": jnp.zeros(2)}
    _, seen = jax.lax.scan(step, (start, kept_policies(start, 4)), jnp.arange(9))
    np.testing.assert_array_equal(seen[:, 0], np.maximum(np.arange(9) - k, 0))


@pytest.mark.parametrize(
    ("weights", "old", "advantages"),
    [
        ("none", [[0, -1, -2, 0], [0, -1, 0, 0]], [[0, 3, -4, 0], [0, 1, 0, 0]]),
        ("importance", [[0, -1 - np.log(2), -2 + np.log(4), 0], [0, -11, 9, 0]], [[0, 3, -4, 0], [0, 1, 0, 0]]),
        # 3 · 2, −4 · ¼, and a weight of e¹⁰ that counts as 5.
        ("decoupled", [[0, -1, -2, 0], [0, -1, 0, 0]], [[0, 6, -1, 0], [0, 5, 0, 0]]),
    ],
)
def test_weights_by_hand(weights, old, advantages):
    mask = jnp.array([[False, True, True, False], [False, True, False, False]])
    zeros = jnp.zeros((2, 4))
    tokens = Tokens(zeros.astype(int), zeros.astype(int), mask, zeros.astype(int), zeros.astype(int))
    current = jnp.array([[0.0, -1.0, -2.0, 0.0], [0.0, -1.0, 0.0, 0.0]])
    given = jnp.array([[0.0, 3.0, -4.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    experience = Experience(tokens, current, zeros, zeros, zeros, given, zeros)
    answers = Completions(
        jnp.zeros((2, 2), int), mask[:, 1:3], jnp.array([[-1 - np.log(2), -2 + np.log(4)], [-11.0, 9.0]])
    )
    found, metrics = weighted(experience, answers, jnp.int32(WEIGHTS.index(weights)))
    np.testing.assert_allclose(found.old_logprobs, old, rtol=1e-6)
    np.testing.assert_allclose(found.advantages, advantages, rtol=1e-6)
    # The sampler's log-probabilities of a row's answer are its KL to a reference of 0: −3 + log 2, and −11.
    np.testing.assert_allclose(metrics["kl_k1"], (-14 + np.log(2)) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["sampler_gap"], (np.log(2) + np.log(4) + 10) / 3, rtol=1e-6)


def test_fresh_answers_have_one_variant():
    assert variants(Config(ages=(0, 4), weights=("none", "decoupled"))) == [
        Variant(0, "none"), Variant(4, "none"), Variant(4, "decoupled"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="none below 0"):
        Config(ages=(-1,))
