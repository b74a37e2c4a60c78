"""Where one loss becomes another."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import losses
from rlhf_jax.logprobs import token_logprobs
from rlhf_jax.masking import constant_mean, masked_mean, sequence_mean

RNG = np.random.default_rng(1)
B, T = 4, 6
MASK = jnp.asarray(RNG.random((B, T)) < 0.7)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_ppo_at_the_old_policy_is_the_policy_gradient():
    logprobs, advantages = normal(B, T), normal(B, T)
    loss, grads = jax.value_and_grad(lambda x: losses.ppo_clip_loss(x, logprobs, advantages, MASK, clip_eps=0.2)[0])(
        logprobs
    )
    count = MASK.sum().astype(jnp.float32)
    assert_allclose(grads, np.where(MASK, -advantages / count, 0.0), rtol=1e-5)
    assert_allclose(loss, np.asarray(-advantages)[np.asarray(MASK)].mean(), rtol=1e-5)


def test_ppo_without_a_clip_is_the_weighted_policy_gradient():
    logprobs, old, advantages = normal(B, T), normal(B, T), normal(B, T)
    loss = losses.ppo_clip_loss(logprobs, old, advantages, MASK, clip_eps=1e9)[0]
    expected = -(np.exp(logprobs - old) * advantages)[np.asarray(MASK)].mean()
    assert_allclose(loss, expected, rtol=1e-5)


def test_ppo_past_the_clip_has_no_gradient():
    old = jnp.zeros((1, 2), jnp.float32)
    advantages, mask = jnp.asarray([[1.0, -1.0]], jnp.float32), jnp.ones((1, 2), bool)
    grad = jax.grad(lambda x: losses.ppo_clip_loss(x, old, advantages, mask, clip_eps=0.2)[0])
    assert not np.any(grad(jnp.asarray([[1.0, -1.0]], jnp.float32)))
    assert np.all(grad(jnp.asarray([[-1.0, 1.0]], jnp.float32)) != 0)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_sft_from_hidden_states_is_sft_from_logprobs(chunk_size):
    hidden, kernel, targets = normal(B, T, 5), normal(5, 7), jnp.asarray(RNG.integers(0, 7, (B, T)))

    def whole(hidden, kernel):
        return losses.sft_loss(token_logprobs(hidden @ kernel, targets), MASK)

    def chunked(hidden, kernel):
        return losses.chunked_sft_loss(hidden, kernel, targets, MASK, chunk_size=chunk_size)

    (loss, metrics), grads = jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)(hidden, kernel)
    (expected, expected_metrics), expected_grads = jax.value_and_grad(whole, argnums=(0, 1), has_aux=True)(
        hidden, kernel
    )
    assert_allclose(loss, expected, rtol=1e-5)
    assert metrics == expected_metrics
    jax.tree.map(lambda a, e: assert_allclose(a, e, rtol=1e-4, atol=1e-6), grads, expected_grads)


def test_values_with_a_wide_clip_are_regressed():
    values, old, returns = normal(B, T), normal(B, T), normal(B, T)
    loss = losses.value_clip_loss(values, old, returns, MASK, clip_eps=1e9)[0]
    assert_allclose(loss, 0.5 * np.square(values - returns)[np.asarray(MASK)].mean(), rtol=1e-5)


def test_grpo_without_kl_is_ppo_with_one_advantage_a_response():
    logprobs, old, ref, advantages = normal(B, T), normal(B, T), normal(B, T), normal(B)
    spread = jnp.broadcast_to(advantages[:, None], (B, T))
    grpo = jax.value_and_grad(
        lambda x: losses.grpo_loss(x, old, ref, advantages, MASK, clip_eps_low=0.2, clip_eps_high=0.2, beta=0.0)[0]
    )
    ppo = jax.value_and_grad(lambda x: losses.ppo_clip_loss(x, old, spread, MASK, clip_eps=0.2)[0])
    jax.tree.map(lambda a, e: assert_allclose(a, e, rtol=1e-5), grpo(logprobs), ppo(logprobs))


def test_two_responses_are_a_pair():
    rewards = normal(B, 2)
    ranks, mask = jnp.broadcast_to(jnp.asarray([[0, 1]]), (B, 2)), jnp.ones((B, 2), bool)

    def pair(rewards):
        return losses.bradley_terry_loss(rewards[:, 0], rewards[:, 1])[0]

    for several in (losses.ranking_loss, losses.plackett_luce_loss):
        result = jax.value_and_grad(lambda x, f=several: f(x, ranks, mask)[0])(rewards)
        jax.tree.map(lambda a, e: assert_allclose(a, e, rtol=1e-5), result, jax.value_and_grad(pair)(rewards))


def test_a_prompts_margin_is_that_of_its_pairs():
    rewards, margin = normal(B, 2), jnp.arange(float(B))
    ranks, mask = jnp.broadcast_to(jnp.asarray([[1, 0]]), (B, 2)), jnp.ones((B, 2), bool)
    loss, metrics = losses.ranking_loss(rewards, ranks, mask, margin=margin)
    expected, also = losses.bradley_terry_loss(rewards[:, 1], rewards[:, 0], margin=margin)
    assert_allclose(loss, expected, rtol=1e-5)
    assert_allclose(metrics["accuracy"], also["accuracy"])
    none = losses.ranking_loss(rewards, ranks, mask, margin=0.0)[0]
    assert_allclose(none, losses.ranking_loss(rewards, ranks, mask)[0])


def test_a_prompts_doubt_is_that_of_its_pairs():
    rewards, doubt, zero = normal(B, 3), jnp.linspace(0.0, 0.5, B), jnp.zeros(B)
    ranks, mask = jnp.broadcast_to(jnp.asarray([[1, 0, 7]]), (B, 3)), jnp.ones((B, 3), bool)
    two = mask.at[:, 2].set(False)
    loss, metrics = losses.ranking_loss(rewards, ranks, two, label_smoothing=doubt)
    expected, also = losses.bradley_terry_loss(rewards[:, 1], rewards[:, 0], label_smoothing=doubt)
    assert_allclose(loss, expected, rtol=1e-5)
    assert_allclose(metrics["accuracy"], also["accuracy"])
    slow = oracles.ranking_loss(*(np.asarray(x) for x in (rewards, ranks, mask)), label_smoothing=np.asarray(doubt))
    assert_allclose(losses.ranking_loss(rewards, ranks, mask, label_smoothing=doubt)[0], slow, rtol=1e-5)
    pairs = normal(B), normal(B), zero, zero
    for name in ("dpo_loss", "ipo_loss"):
        slow = getattr(oracles, name)(*map(np.asarray, pairs), beta=0.3, label_smoothing=np.asarray(doubt))
        assert_allclose(getattr(losses, name)(*pairs, beta=0.3, label_smoothing=doubt)[0], slow, rtol=1e-5)
    # Without doubt nothing changes, to the last bit.
    sure = losses.ranking_loss(rewards, ranks, mask, label_smoothing=zero)
    jax.tree.map(assert_array_equal, sure, losses.ranking_loss(rewards, ranks, mask))


def test_a_label_of_one_half_pulls_two_scores_together():
    ranks, mask = jnp.asarray([[0, 1]] * 3), jnp.ones((3, 2), bool)
    rewards = jnp.asarray([[2.0, -1.0], [-1.0, 2.0], [0.5, 0.5]])
    pull = jax.grad(lambda r: losses.ranking_loss(r, ranks, mask, label_smoothing=0.5)[0])(rewards)
    assert pull[0, 0] > 0 > pull[0, 1] and pull[1, 0] < 0 < pull[1, 1]
    assert_allclose(pull[2], [0.0, 0.0], atol=1e-7)
    # dL/dΔ = (σ(Δ) − p) / 3 prompts, here with p = ½.
    assert_allclose(pull[0, 0], (1 / (1 + math.exp(-3)) - 0.5) / 3, rtol=1e-5)
    # It rests where σ(Δ) is the label: log 3 for 3/4.
    rest = jax.grad(lambda r: losses.ranking_loss(r, ranks[:1], mask[:1], label_smoothing=0.25)[0])
    assert_allclose(rest(jnp.asarray([[math.log(3), 0.0]])), [[0.0, 0.0]], atol=1e-6)
    # IPO rests at Δ = (½ − ε)/β: at ½ for ε = ¼ and β = ½.
    zero = jnp.zeros(1)
    rest = jax.grad(lambda c: losses.ipo_loss(c, zero, zero, zero, beta=0.5, label_smoothing=0.25)[0])
    assert_allclose(rest(jnp.asarray([0.5])), [0.0], atol=1e-7)


@settings(max_examples=10, deadline=None, phases=(Phase.generate,))
@given(shift=st.floats(-10, 10, width=32))
def test_only_differences_of_rewards_count(shift):
    chosen, rejected, rewards = jnp.arange(3.0), jnp.ones(3), jnp.asarray([[0.5, -1.0, 2.0]])
    ranks, mask = jnp.asarray([[1, 2, 0]]), jnp.ones((1, 3), bool)
    moved = losses.bradley_terry_loss(chosen + shift, rejected + shift)[0]
    assert_allclose(moved, losses.bradley_terry_loss(chosen, rejected)[0], rtol=1e-4)
    for several in (losses.ranking_loss, losses.plackett_luce_loss):
        assert_allclose(several(rewards + shift, ranks, mask)[0], several(rewards, ranks, mask)[0], rtol=1e-4)


@pytest.mark.parametrize("beta", [0.01, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_dpo_at_the_reference_is_log_2(beta, label_smoothing):
    chosen, rejected = normal(B), normal(B)
    loss, metrics = losses.dpo_loss(chosen, rejected, chosen, rejected, beta=beta, label_smoothing=label_smoothing)
    assert_allclose(loss, math.log(2), rtol=1e-6)
    assert metrics["accuracy"] == 0.5 and metrics["margin"] == 0


def test_dpo_is_bradley_terry_on_implicit_rewards():
    chosen, rejected, ref_chosen, ref_rejected = (normal(B) for _ in range(4))
    loss = losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)[0]
    implicit = losses.bradley_terry_loss(0.3 * (chosen - ref_chosen), 0.3 * (rejected - ref_rejected))[0]
    assert_allclose(loss, implicit, rtol=1e-6)


def test_dpo_gradient_at_the_reference():
    chosen, rejected = normal(B), normal(B)
    grads = jax.grad(lambda c, r: losses.dpo_loss(c, r, chosen, rejected, beta=0.3)[0], argnums=(0, 1))(
        chosen, rejected
    )
    assert_allclose(grads, [[-0.15 / B] * B, [0.15 / B] * B], rtol=1e-5)


def test_ipo_at_the_reference():
    chosen, rejected = normal(B), normal(B)
    assert_allclose(losses.ipo_loss(chosen, rejected, chosen, rejected, beta=0.1)[0], 25.0, rtol=1e-5)


def test_simpo_of_one_token_without_margin_is_dpo_with_a_flat_reference():
    chosen, rejected, one, zero = normal(B), normal(B), jnp.ones(B), jnp.zeros(B)
    simpo = losses.simpo_loss(chosen, rejected, one, one, beta=0.3, gamma=0.0)[0]
    assert_allclose(simpo, losses.dpo_loss(chosen, rejected, zero, zero, beta=0.3)[0], rtol=1e-6)


def test_orpo_without_odds_is_sft_per_response():
    chosen, rejected = -jnp.abs(normal(B)), -jnp.abs(normal(B))
    lengths = jnp.full(B, 4.0)
    loss = losses.orpo_loss(chosen, rejected, lengths, lengths, beta=0.0)[0]
    assert_allclose(loss, losses.sft_loss(chosen[:, None] / 4.0, jnp.ones((B, 1), bool))[0], rtol=1e-6)


def test_kto_at_the_reference_is_half_the_mean_weight():
    logprobs, desirable = normal(4), jnp.asarray([True, True, True, False])
    loss, _ = losses.kto_loss(
        logprobs, logprobs, desirable, jnp.float32(0.0), beta=0.7, desirable_weight=1.0, undesirable_weight=3.0
    )
    assert_allclose(loss, 0.75, rtol=1e-6)


@pytest.mark.parametrize("reduce", [masked_mean, sequence_mean, partial(constant_mean, length=9)])
def test_at_the_old_policy_every_objective_has_the_gradient_of_reinforce(reduce):
    logprobs, ref, advantages = normal(B, T), normal(B, T), normal(B)
    clips = {"clip_eps_low": 0.2, "clip_eps_high": 0.2}

    def grpo(x):
        return losses.grpo_loss(x, logprobs, ref, advantages, MASK, beta=0.0, reduce=reduce, **clips)[0]

    def cispo(x):
        return losses.cispo_loss(x, logprobs, advantages, MASK, reduce=reduce, **clips)[0]

    expected = jax.grad(lambda x: losses.reinforce_loss(x, advantages, MASK, reduce=reduce)[0])(logprobs)
    assert_allclose(jax.grad(grpo)(logprobs), expected, rtol=1e-5, atol=1e-7)
    assert_allclose(jax.grad(cispo)(logprobs), expected, rtol=1e-5, atol=1e-7)
    if reduce is sequence_mean:  # the average of a ratio that is of a whole response
        gspo = jax.grad(lambda x: losses.gspo_loss(x, logprobs, advantages, MASK, **clips)[0])(logprobs)
        assert_allclose(gspo, expected, rtol=1e-5, atol=1e-7)


def test_of_one_length_dr_grpo_is_grpo_and_of_one_token_gspo_is():
    logprobs, old, ref, advantages = normal(B, T), normal(B, T), normal(B, T), normal(B)
    full, clips = jnp.ones((B, T), bool), {"clip_eps_low": 0.2, "clip_eps_high": 0.3}

    def grpo(mask, reduce):
        return losses.grpo_loss(logprobs, old, ref, advantages, mask, beta=0.0, reduce=reduce, **clips)[0]

    assert_allclose(grpo(full, partial(constant_mean, length=T)), grpo(full, sequence_mean), rtol=1e-6)
    assert_allclose(grpo(full, masked_mean), grpo(full, sequence_mean), rtol=1e-6)
    one = jnp.arange(T)[None] == jnp.arange(B)[:, None]
    gspo = losses.gspo_loss(logprobs, old, advantages, one, **clips)[0]
    assert_allclose(gspo, grpo(one, sequence_mean), rtol=1e-6)


def test_importance_weights_are_bounded_and_one_where_sampler_and_trainer_agree():
    logprobs = jnp.asarray([[-1.0, -1.0, -1.0, -1.0, jnp.nan]])
    sampler = jnp.asarray([[-1.0, -1.0 - jnp.log(3.0), -1.0 + jnp.log(4.0), -200.0, 0.0]])
    mask = jnp.asarray([[True, True, True, True, False]])
    weights = losses.truncated_importance_weights(logprobs, sampler, mask, cap=2.0)
    assert_allclose(weights, [[1, 2, 0.25, 2, 0]], rtol=1e-6)
    dropped = losses.truncated_importance_weights(logprobs, sampler, mask, cap=5.0, floor=0.5, drop=True)
    assert_allclose(dropped, [[1, 3, 0, 0, 0]], rtol=1e-6)
    assert_allclose(losses.truncated_importance_weights(logprobs, sampler, mask, cap=2.0, floor=0.5)[0, 2], 0.5)
    total = lambda x: losses.truncated_importance_weights(x, sampler, mask, cap=9.0).sum()  # noqa: E731
    assert not np.any(jax.grad(total)(logprobs))


def test_the_weights_of_a_sampler_make_the_gradient_that_of_the_trainer():
    """E over the sampler of w ∇log π is E over the policy of ∇log π: all of three tokens, by their chances."""
    scores, sampler = jnp.asarray([0.3, -0.5, 0.1]), jax.nn.log_softmax(jnp.asarray([0.0, 0.4, -0.2]))
    rewards = jnp.asarray([1.0, 0.0, -2.0])

    def loss(scores, chances, weighted):
        logprobs = jax.nn.log_softmax(scores)[:, None]
        mask = jnp.ones((3, 1), bool)
        weights = losses.truncated_importance_weights(logprobs, sampler[:, None], mask, cap=1e9)
        return losses.reinforce_loss(
            logprobs,
            rewards,
            mask,
            reduce=lambda x, _: (x[:, 0] * chances).sum(),
            weights=weights if weighted else None,
        )[0]

    policy = jax.nn.softmax(scores)
    assert_allclose(
        jax.grad(loss)(scores, jnp.exp(sampler), True), jax.grad(loss)(scores, policy, False), rtol=1e-5, atol=1e-7
    )
