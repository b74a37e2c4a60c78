import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_jax.evaluate import (
    calibration,
    judged_win_rate,
    length_baseline,
    perplexity,
    preference_accuracy,
    wilson_interval,
    win_rate,
)


def test_wilson_by_hand():
    # z² = 3.8415, n = 10: centre (0.8 + 0.19207) / 1.38415, half 1.96 √(0.016 + 0.0096036) / 1.38415.
    rate, low, high = wilson_interval(8, 10)
    assert_allclose([rate, low, high], [0.8, 0.490162, 0.943318], atol=1e-6)
    # At p = 1 the interval is [n / (n + z²), 1].
    assert_allclose(wilson_interval(5, 5), [1.0, 5 / (5 + 3.841459), 1.0], atol=1e-6)
    assert_allclose(wilson_interval(0, 5), [0.0, 0.0, 3.841459 / (5 + 3.841459)], atol=1e-6)
    for trials in range(1, 60):
        for successes in range(trials + 1):
            rate, low, high = wilson_interval(successes, trials)
            assert 0 <= low <= rate <= high <= 1


def test_wilson_holds_its_95_percent():
    rng = np.random.default_rng(0)
    for p in (0.5, 0.75, 0.95):
        intervals = [wilson_interval(k, 60) for k in rng.binomial(60, p, 4000).tolist()]
        inside = [low <= p <= high for _, low, high in intervals]
        assert 0.93 < np.mean(inside) < 0.975


def test_ties_count_half():
    assert win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, 0.0])[0] == (1 + 0.5 + 0.5) / 4
    assert win_rate([1.0] * 8, [1.0] * 8).rate == 0.5


def test_sides_turned_round_add_up_to_one():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 3, (2, 50))
    there, back = win_rate(a, b), win_rate(b, a)
    assert_allclose([there.rate, there.low, there.high], [1 - back.rate, 1 - back.high, 1 - back.low])


def test_accuracy_and_length_baseline():
    assert preference_accuracy([2.0, 1.0, 0.5], [1.0, 3.0, 0.0]).rate == pytest.approx(2 / 3)
    assert length_baseline([5, 3, 4, 4], [4, 6, 4, 1]).rate == pytest.approx(2.5 / 4)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([np.nan], [1.0])])
def test_what_is_no_rate_is_refused(a, b):
    with pytest.raises(ValueError):
        win_rate(a, b)


def test_calibration_by_hand():
    # σ(0) = 0.5 and σ(±log 3) = 0.75, 0.25; two bins: {0.25} and {0.5, 0.75, 0.75}.
    log3 = np.log(3)
    table = calibration([0.0, log3, log3, -log3], [True, True, False, True], bins=2)
    assert_allclose(table.counts, [1, 3])
    assert_allclose(table.predicted, [0.25, 2 / 3])
    assert_allclose(table.observed, [1.0, 2 / 3])
    assert table.error == pytest.approx(0.25 * 0.75)


def test_outcomes_drawn_from_the_model_are_calibrated_and_a_doubled_margin_is_not():
    rng = np.random.default_rng(2)
    margins = rng.normal(0, 2, 100_000)
    outcomes = rng.random(margins.size) < 1 / (1 + np.exp(-margins))
    assert calibration(margins, outcomes, bins=10).error < 0.01
    assert calibration(2 * margins, outcomes, bins=10).error > 0.05


def test_extreme_margins_stay_in_the_table():
    table = calibration([1e9, -1e9, np.inf], [1, 0, 1], bins=10)
    assert table.error == 0.0 and table.counts.sum() == 3
    with pytest.raises(ValueError, match="at least one pair"):
        calibration([], [], bins=10)


def test_judged_win_rate_by_hand():
    # Both orders: win, loss, tie, torn between, torn between, and a tie beside a win.
    rates = judged_win_rate([0.9, 0.0, 0.5, 1.0, 0.4, 0.5], [0.6, 0.3, 0.5, 0.0, 0.7, 1.0])
    assert rates.win == wilson_interval(1 + 0 + 4 * 0.5, 6)
    assert rates.consistent == wilson_interval(3, 6)
    # For the first shown: 1 and 0 (its rival), 0 and 1, ½ and ½, 1 and 1, 0 and 0, ½ and 0.
    assert rates.first_shown == wilson_interval(0.5 + 0.5 + 0.5 + 1 + 0 + 0.25, 6)


def test_judged_win_rate_of_the_sides_turned_round():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 3, (2, 40)) / 2
    there, back = judged_win_rate(a, b), judged_win_rate(1 - b, 1 - a)
    assert there.win.rate + back.win.rate == 1.0 and there.consistent == back.consistent
    # Who is shown first stays the same.
    assert there.first_shown == back.first_shown


def test_perplexity_by_hand():
    # Documents of 1 and 3 tokens with nats 1 and 5: 6 nats over 4 tokens.
    value, low, high, tokens = perplexity([-1.0, -5.0], [1, 3])
    # Residuals 1 - 1.5 and 5 - 4.5; s = √(2 · 0.5) / 4.
    expected = [np.exp(1.5), np.exp(1.5 - 1.959964 / 4), np.exp(1.5 + 1.959964 / 4)]
    assert_allclose([value, low, high], expected, rtol=1e-6)
    assert tokens == 4
    # Guessing among V words is a perplexity of V, whatever the lengths.
    assert_allclose(perplexity([-2 * np.log(7), -5 * np.log(7)], [2, 5])[:3], [7, 7, 7])
    assert np.isnan(perplexity([-1.0], [2]).low) and perplexity([-1e6, -1e6], [1, 1]).perplexity == np.inf


def test_perplexity_holds_its_95_percent():
    rng = np.random.default_rng(4)
    inside = []
    for _ in range(2000):
        counts = rng.integers(1, 30, 60)
        # A document has a difficulty of its own.
        sums = -counts * rng.gamma(4.0, 0.5, 60)
        _, low, high, _ = perplexity(sums, counts)
        inside.append(low <= np.exp(2.0) <= high)
    assert 0.92 < np.mean(inside) < 0.97


@pytest.mark.parametrize(("sums", "counts"), [([], []), ([0.0], [0]), ([1.0], [1, 2]), ([[1.0]], [[1]])])
def test_what_has_no_perplexity_is_refused(sums, counts):
    with pytest.raises(ValueError):
        perplexity(sums, counts)
