"""Each loss on numbers that can be worked out on paper."""

import math

import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from rlhf_jax import losses

LOG2, LOG3 = math.log(2), math.log(3)


def f32(*numbers):
    return jnp.asarray(numbers, jnp.float32)


def row(*numbers):
    return f32(*numbers)[None]


def on(*bits):
    return jnp.asarray([bits], bool)


def check(result, loss, **metrics):
    value, given = result
    assert_allclose(value, loss, rtol=1e-5, atol=1e-7)
    for name, expected in metrics.items():
        assert_allclose(given[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_sft():
    check(losses.sft_loss(row(-1.0, -2.0, -6.0), on(1, 1, 0)), 1.5, tokens=2)


def test_sft_weighs_tokens_not_sequences():
    logprobs = jnp.asarray([[-1.0, 0.0, 0.0], [-2.0, -2.0, -2.0]], jnp.float32)
    mask = jnp.asarray([[True, False, False], [True, True, True]])
    check(losses.sft_loss(logprobs, mask), 7 / 4)


@pytest.mark.parametrize(
    "ratio, advantage, loss, clipped",
    [
        (1.5, 2.0, -2.4, 1),  # better, and already taken far enough: −1.2 · 2
        (1.5, -2.0, 3.0, 1),  # worse, and more likely: nothing holds the loss back
        (0.5, 2.0, -1.0, 1),
        (0.5, -2.0, 1.6, 1),
        (1.1, 2.0, -2.2, 0),
    ],
)
def test_ppo_clip(ratio, advantage, loss, clipped):
    args = row(math.log(ratio)), row(0.0), row(advantage), on(1)
    k3 = ratio - 1 - math.log(ratio)
    metrics = {"clip_fraction": clipped, "ratio": ratio, "ratio_max": ratio, "approx_kl": k3}
    check(losses.ppo_clip_loss(*args, clip_eps=0.2), loss, **metrics)


def test_ppo_counts_the_tokens_that_are_clipped():
    args = row(math.log(1.5), math.log(0.9), math.log(1.3), 9.0), row(0.0, 0.0, 0.0, 0.0), row(1.0, 1.0, -1.0, 1.0)
    result = losses.ppo_clip_loss(*args, on(1, 1, 1, 0), clip_eps=0.2)
    check(result, -(1.2 + 0.9 - 1.3) / 3, clip_fraction=2 / 3, ratio=3.7 / 3, ratio_max=1.5)


@pytest.mark.parametrize("log_ratio", [1e-5, -1e-3])
def test_a_small_kl_is_not_lost_in_rounding(log_ratio):
    """As 1e-5 moves no digit of 1.0 that float32 has to spare: ρ − 1 − log ρ would be 300 times too large."""
    new, old = row(log_ratio), row(0.0)
    _, ppo = losses.ppo_clip_loss(new, old, row(1.0), on(1), clip_eps=0.2)
    _, grpo = losses.grpo_loss(new, old, old, f32(1.0), on(1), clip_eps_low=0.2, clip_eps_high=0.2, beta=0.1)
    for kl in (ppo["approx_kl"], grpo["approx_kl"], grpo["kl"]):
        assert_allclose(kl, log_ratio**2 / 2, rtol=0.01)


@pytest.mark.parametrize(
    "value, loss, clipped",
    [
        (2.0, 0.5 * 2.8**2, 1),  # old 0, return 3: 2 is nearer, but the clipped 0.2 is what counts
        (-2.0, 0.5 * 5.0**2, 0),
        (0.1, 0.5 * 2.9**2, 0),
    ],
)
def test_value_clip(value, loss, clipped):
    result = losses.value_clip_loss(row(value), row(0.0), row(3.0), on(1), clip_eps=0.2)
    check(result, loss, clip_fraction=clipped, error=(value - 3) ** 2)


@pytest.mark.parametrize("ratio, advantage, surrogate", [(1.25, 1.0, -1.25), (1.5, 1.0, -1.3), (0.5, -1.0, 0.8)])
def test_grpo(ratio, advantage, surrogate):
    # π = 2 π_ref: k₃ = ½ − 1 + log 2.
    k3 = LOG2 - 0.5
    args = row(-LOG2), row(-LOG2 - math.log(ratio)), row(-2 * LOG2), f32(advantage), on(1)
    result = losses.grpo_loss(*args, clip_eps_low=0.2, clip_eps_high=0.3, beta=0.1)
    check(result, surrogate + 0.1 * k3, kl=k3, clip_fraction=float(ratio != 1.25))


def test_bradley_terry():
    # σ(log 3) = 3/4; a tie is a coin.
    result = losses.bradley_terry_loss(f32(LOG3, 1.0), f32(0.0, 1.0))
    check(result, 0.5 * (math.log(4 / 3) + LOG2), accuracy=0.75, reward_difference=LOG3 / 2)


def test_bradley_terry_margin():
    check(losses.bradley_terry_loss(f32(LOG3), f32(0.0), margin=LOG3), LOG2, accuracy=1.0)
    check(losses.bradley_terry_loss(f32(LOG3, LOG3), f32(0.0, 0.0), margin=f32(LOG3, 0)), 0.5 * math.log(8 / 3))


def test_ranking():
    # Three pairs at differences log 3, log 3 and 2 log 3 = log 9: σ = 3/4, 3/4, 9/10.
    rewards, ranks = row(0.0, 2 * LOG3, LOG3), jnp.asarray([[2, 0, 1]])
    loss = -(2 * math.log(3 / 4) + math.log(9 / 10)) / 3
    check(losses.ranking_loss(rewards, ranks, on(1, 1, 1)), loss, accuracy=1.0, reward_difference=4 / 3 * LOG3)


def test_soft_rankings():
    # σ = 3/4, 3/4 and 9/10 as above; with probability 1/5 each pair is the other way round: 1/4, 1/4 and 1/10.
    rewards, ranks = row(0.0, 2 * LOG3, LOG3), jnp.asarray([[2, 0, 1]])
    right, wrong = 2 * math.log(3 / 4) + math.log(9 / 10), 2 * math.log(1 / 4) + math.log(1 / 10)
    loss = -(0.8 * right + 0.2 * wrong) / 3
    check(losses.ranking_loss(rewards, ranks, on(1, 1, 1), label_smoothing=0.2), loss, accuracy=1.0)
    # Δ = log 3 and a margin of log 3: σ(0) if it is right, σ(−log 9) = 1/10 if not.
    pair, order = row(LOG3, 0.0), jnp.asarray([[0, 1]])
    loss = 0.75 * LOG2 + 0.25 * math.log(10)
    check(losses.ranking_loss(pair, order, on(1, 1), margin=LOG3, label_smoothing=f32(0.25)), loss, accuracy=1.0)


def test_plackett_luce():
    # 9 of 9 + 3 + 1, then 3 of 3 + 1, then 1 of 1.
    rewards, ranks = row(0.0, 2 * LOG3, LOG3), jnp.asarray([[2, 0, 1]])
    check(losses.plackett_luce_loss(rewards, ranks, on(1, 1, 1)), -math.log(9 / 13 * 3 / 4), accuracy=1.0)


def test_a_prompt_whose_responses_tie_has_no_pairs():
    rewards, mask = jnp.asarray([[0.0, LOG3], [5.0, 7.0]], jnp.float32), jnp.ones((2, 2), bool)
    ranks = jnp.asarray([[1, 0], [0, 0]])
    check(losses.ranking_loss(rewards, ranks, mask), math.log(4 / 3), accuracy=1.0)
    # Each tied response is chosen among itself alone; the prompt still counts as one.
    check(losses.plackett_luce_loss(rewards, ranks, mask), math.log(4 / 3) / 2, accuracy=1.0)


def pairs(chosen, rejected, ref_chosen=0.0, ref_rejected=0.0):
    return f32(chosen), f32(rejected), f32(ref_chosen), f32(ref_rejected)


def test_dpo():
    # Chosen up by 2 log 3, rejected down by 2 log 3; β Δ = ¼ · 4 log 3 = log 3.
    args = pairs(-1.0, -5.0, -1.0 - 2 * LOG3, -5.0 + 2 * LOG3)
    check(
        losses.dpo_loss(*args, beta=0.25),
        math.log(4 / 3),
        accuracy=1.0,
        margin=LOG3,
        chosen_reward=LOG3 / 2,
        rejected_reward=-LOG3 / 2,
    )
    smoothed = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    check(losses.dpo_loss(*args, beta=0.25, label_smoothing=0.1), smoothed)


def test_ipo():
    check(losses.ipo_loss(*pairs(3.0, 1.0, 1.5, 1.0), beta=0.5), 0.25, accuracy=1.0, margin=0.75)
    # Δ = 1.5 is ½ from the aim of 1, and 2½ from −1.
    loss = 0.8 * 0.25 + 0.2 * 6.25
    check(losses.ipo_loss(*pairs(3.0, 1.0, 1.5, 1.0), beta=0.5, label_smoothing=f32(0.2)), loss, accuracy=1.0)


def test_simpo():
    # 2 · (−6/3) − 2 · (−8/2) − (4 − log 3) = log 3.
    result = losses.simpo_loss(*pairs(-6.0, -8.0, 3.0, 2.0), beta=2.0, gamma=4 - LOG3)
    check(result, math.log(4 / 3), margin=4.0, accuracy=1.0)


def test_lengths_may_be_counts():
    args = pairs(-6.0, -8.0)[:2]
    for loss, settings in ((losses.simpo_loss, {"beta": 2.0, "gamma": 0.3}), (losses.orpo_loss, {"beta": 0.5})):
        counts = loss(*args, jnp.asarray([3]), jnp.asarray([2]), **settings)[0]
        assert_allclose(counts, loss(*args, f32(3.0), f32(2.0), **settings)[0], rtol=1e-6)


def test_orpo():
    # Per token p_w = 3/4 and p_l = 1/2: odds 3 and 1.
    args = pairs(2 * math.log(3 / 4), -3 * LOG2, 2.0, 3.0)
    result = losses.orpo_loss(*args, beta=0.5)
    check(result, math.log(4 / 3) * 1.5, nll=math.log(4 / 3), log_odds_ratio=-math.log(4 / 3))


def test_orpo_of_a_certain_response_is_finite():
    value, _ = losses.orpo_loss(*pairs(0.0, -1.0, 2.0, 0.0), beta=0.5)
    assert jnp.isfinite(value)


def test_kto():
    # β(r − z₀) = log 3 for the good one and −log 3 for the bad: 1 − σ is ¼ for both.
    args = f32(2 * LOG3 + 1, -1.0), f32(0.0, 2 * LOG3 - 2), jnp.asarray([True, False]), jnp.float32(1.0)
    result = losses.kto_loss(*args, beta=0.5, desirable_weight=1.0, undesirable_weight=3.0)
    check(result, 0.5, kl=1.0, reward=0.5)


def test_kto_baseline_is_never_negative():
    args = f32(LOG3), f32(0.0), jnp.asarray([True]), jnp.float32(-7.0)
    check(losses.kto_loss(*args, beta=1.0, desirable_weight=1.0, undesirable_weight=1.0), 0.25, kl=0.0)
