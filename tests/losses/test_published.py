"""The numbers that other libraries' own tests expect, as a suite from outside.

Their advantages are one a token; each token is a row of its own here. A comment names the library and its test file.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_jax import losses
from rlhf_jax.advantages import group_advantages, leave_one_out_advantages
from rlhf_jax.kl import kl_k1, kl_k2, kl_k3
from rlhf_jax.masking import constant_mean, masked_mean, sequence_mean
from rlhf_jax.rewards.lengths import overlong_penalty

CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.2}


def rows(*numbers):
    """[B, 1]"""
    return jnp.asarray(numbers, jnp.float32)[:, None]


def f32(numbers):
    return jnp.asarray(numbers, jnp.float32)


ALL = jnp.ones((3, 1), bool)
A, OLD, NEW, SAMPLER = f32([1, -1, 2]), rows(-1, -1, -1), rows(-1.69315, -1, -0.59453), rows(-0.5, -1.5, -0.8)


# NVIDIA-NeMo/RL, tests/unit/algorithms/test_loss_functions.py


@pytest.mark.parametrize(("cap", "loss"), [(None, -0.6333), (1e9, -0.2065), (0.8, -0.4744)])
def test_the_clipped_loss_and_its_weights_are_nemos(cap, loss):
    weights = None if cap is None else losses.truncated_importance_weights(OLD, SAMPLER, ALL, cap=cap)
    found, _ = losses.grpo_loss(NEW, OLD, OLD, A, ALL, beta=0.0, weights=weights, **CLIP)
    assert_allclose(found, loss, atol=1e-4)


def test_reinforce_is_nemos():
    assert_allclose(losses.reinforce_loss(rows(-0.5, -1, -1.5), A, ALL)[0], 0.8333, atol=1e-4)


def test_the_kl_is_nemos_alone_and_in_the_loss():
    zero = rows(0, 0, 0)
    loss, _ = losses.grpo_loss(rows(0, -1, -2), zero, rows(-1, -1, -1), 0 * A, ALL, beta=0.1, **CLIP)
    assert_allclose(loss, 0.0362, atol=1e-4)
    pairs = rows(-1, -1, -1), rows(0, -15, -30)
    for estimator, numbers in ((kl_k1, [-1, 14, 29]), (kl_k2, [0.5, 98, 420.5]), (kl_k3, [0.7183, 13, 28])):
        assert_allclose(estimator(*pairs)[:, 0], numbers, atol=1e-4)


def test_gspo_is_nemos():
    loss, _ = losses.gspo_loss(NEW.T, OLD.T, f32([2 / 3]), ALL.T, **CLIP)
    assert_allclose(loss, -0.6057, atol=1e-4)


def test_cispo_is_nemos():
    ratio = np.clip(np.exp(NEW - OLD)[:, 0], 0.8, 1.2)
    loss, _ = losses.cispo_loss(NEW, OLD, A, ALL, **CLIP)
    assert_allclose(loss, np.mean(-A * ratio * NEW[:, 0]), rtol=1e-5)


# volcengine/verl, tests/trainer/ppo/test_rollout_corr.py, and NeMo's rows for IcePop


@pytest.mark.parametrize(
    ("trainer", "sampler", "weight"), [(-2.0, -1.0, 0.368), (-2.0, -2.5, 1.649), (-1.0, -3.5, 2.0)]
)
def test_importance_weights_are_verls(trainer, sampler, weight):
    found = losses.truncated_importance_weights(rows(trainer), rows(sampler), ALL[:1], cap=2.0)
    assert_allclose(found[0, 0], weight, atol=1e-3)


# NovaSky-AI/SkyRL, test_losses.py and skyrl-train/tests/cpu/utils/test_ppo_utils.py


def test_cispo_is_skyrls():
    loss, _ = losses.cispo_loss(rows(-1.69315, -1, -0.69741), rows(-1, -1, -3), f32([1, -1, -4]), ALL, **CLIP)
    assert_allclose(3 * loss, -2.9930, atol=1e-3)


def test_advantages_are_skyrls():
    rewards = f32([6, 3, 9, 12])
    assert_allclose(leave_one_out_advantages(rewards, group_size=2), [3, -3, -3, 3], atol=1e-6)
    assert_allclose(group_advantages(rewards, group_size=2, scale_by_std=False), [1.5, -1.5, -1.5, 1.5], atol=1e-6)


# google/tunix, tests/rl/grpo/drgrpo_learner_test.py, tests/rl/algo_core_test.py

REWARDS = f32([0.57450044, 0.09968603, 0.7419659, 0.8941783, 0.59656656, 0.45325184])


def test_advantages_are_tunixs():
    found = group_advantages(REWARDS, group_size=3, scale_by_std=False)
    assert_allclose(found, [0.10245, -0.372365, 0.269915, 0.246179, -0.051432, -0.194747], atol=1e-5)
    expected = [-1.5, 0, 1.5, -1.5, 0, 1.5]
    assert_allclose(leave_one_out_advantages(f32([1, 2, 3, 4, 5, 6]), group_size=3), expected, atol=1e-6)


def test_over_the_std_tunixs_advantages_are_ours_by_the_samples_std():
    """Theirs divides by G − 1, as TRL's and verl's; ours by G (the docstring of `group_advantages`)."""
    found = group_advantages(REWARDS, group_size=3, scale_by_std=True) * np.sqrt(2 / 3)
    assert_allclose(found, [0.307498, -1.117636, 0.810138, 1.094526, -0.228671, -0.865855], atol=1e-3)


# SkyRL's and Tunix's (tests/rl/common_test.py) ways to average


@pytest.mark.parametrize(
    ("x", "mask", "tokens", "sequences", "length", "constant"),
    [
        ([[1, 2, 3], [4, 5, 6]], [[1, 1, 1], [1, 0, 0]], 2.5, 3.0, 4, 1.25),
        ([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], [[1, 1, 0], [1, 1, 1]], 0.36, 0.325, 3, 0.3),
        ([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], [[1, 1, 0], [1, 1, 1]], 0.36, 0.325, 3.14, 1.8 / 3.14 / 2),
    ],
)
def test_averages_are_theirs(x, mask, tokens, sequences, length, constant):
    x, mask = f32(x), jnp.asarray(mask, bool)
    assert_allclose(masked_mean(x, mask), tokens, rtol=1e-6)
    assert_allclose(sequence_mean(x, mask), sequences, rtol=1e-6)
    assert_allclose(constant_mean(x, mask, length=length), constant, rtol=1e-6)


def test_a_row_without_tokens_counts_in_dr_grpos_average_but_not_in_tunixs():
    """Tunix has 0.3: it leaves empty rows out. Dr. GRPO divides by all that were sampled, whatever is in them."""
    assert_allclose(constant_mean(f32([[0.1, 0.2], [0.3, 0.4]]), jnp.asarray([[1, 1], [0, 0]], bool), length=1), 0.15)


# huggingface/trl, tests/test_rewards.py; Tunix's and NeMo's have a factor of 10 and of ½, and no floor


@pytest.mark.parametrize(
    ("longest", "buffer", "length", "penalty"),
    [
        (100, 20, 50, 0), (100, 20, 90, -0.5), (100, 20, 110, -1),
        (100, 20, 70, 0), (100, 20, 80, 0), (100, 20, 90, -5 / 10), (100, 20, 100, -10 / 10),
        (25, 5, 10, 0), (25, 5, 22, -0.2 * 2), (25, 5, 25, -0.5 * 2),
    ],
)  # fmt: skip
def test_the_punishment_of_long_answers_is_theirs(longest, buffer, length, penalty):
    assert_allclose(overlong_penalty(jnp.asarray([length]), max_length=longest, buffer=buffer)[0], penalty, rtol=1e-6)
