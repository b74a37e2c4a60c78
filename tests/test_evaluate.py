from functools import cache
from itertools import combinations

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import minimize_scalar

from rlhf_jax.evaluate import (
    Z95,
    best_of_n_kl,
    best_of_n_mean,
    calibration,
    clustered_rate,
    judged_win_rate,
    length_baseline,
    pass_at_k,
    perplexity,
    preference_accuracy,
    trinomial_interval,
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


def test_without_ties_the_trinomial_interval_is_wilsons():
    for wins, losses in ((8, 2), (0, 5), (5, 0), (30, 31)):
        assert_allclose(trinomial_interval(wins, 0, losses), wilson_interval(wins, wins + losses), atol=1e-9)


@pytest.mark.parametrize("counts", [(8, 10, 2), (3, 1, 0), (0, 5, 4), (40, 5, 60)])
def test_the_edges_of_the_trinomial_interval_are_where_the_score_test_rejects(counts):
    wins, ties, losses = counts
    n = sum(counts)

    def statistic(delta):
        """The score test at δ, the most likely P(loss) with it found by search."""

        def surprise(loss):
            win = loss + delta
            parts = [(wins, win), (ties, 1 - win - loss), (losses, loss)]
            return -sum(count * np.log(max(p, 1e-300)) for count, p in parts if count)

        bounds = max(0.0, -delta), (1 - delta) / 2
        loss = minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        return abs(wins - losses - n * delta) / np.sqrt(n * (2 * loss + delta - delta**2))

    rate, low, high = trinomial_interval(*counts)
    assert rate == pytest.approx((wins + ties / 2) / n)
    for edge in (low, high):
        if 0 < edge < 1:
            assert statistic(2 * edge - 1) == pytest.approx(Z95, abs=1e-3)
    assert low < rate < high


@pytest.mark.parametrize("chances", [(0.3, 0.6, 0.1), (0.1, 0.8, 0.1), (0.45, 0.4, 0.15)])
def test_with_ties_the_interval_holds_its_95_percent_and_wilsons_more(chances):
    rng = np.random.default_rng(4)
    truth, drawn = chances[0] + chances[1] / 2, rng.multinomial(60, chances, 2000)
    interval = cache(trinomial_interval)  # the same counts are drawn again and again
    inside = np.mean([low <= truth <= high for _, low, high in (interval(*d) for d in drawn.tolist())])
    halves = [wilson_interval(wins + ties / 2, 60) for wins, ties, _ in drawn.tolist()]
    assert 0.93 < inside < 0.975 < np.mean([low <= truth <= high for _, low, high in halves])


def test_a_clustered_rate_by_hand_and_where_nothing_varies():
    # p = 5/8; residuals 3 − 2.5, 2 − 2.5; s² = 2 · 0.5 / 64, so 0.234375 / 0.015625 = 15 trials, which are at most 8,
    # and t with one degree of freedom is 12.7062.
    trials = 8 * (Z95 / 12.706205) ** 2
    assert_allclose(clustered_rate([3, 2], [4, 4]), wilson_interval(5 / 8 * trials, trials), rtol=1e-6)
    assert clustered_rate([1, 0, 1], [1, 1, 1]) == wilson_interval(2, 3)
    assert clustered_rate([4, 4], [4, 4]) == wilson_interval(2, 2)
    assert clustered_rate([1, 0, 0], [1, 1, 0]) == wilson_interval(1, 2)
    with pytest.raises(ValueError, match="at least one trial"):
        clustered_rate([0.0], [0])


def test_clusters_hold_their_95_percent_where_independent_trials_do_not():
    rng = np.random.default_rng(5)
    inside, independent = [], []
    for _ in range(1500):
        counts = rng.integers(1, 6, 40)
        hits = rng.binomial(counts, rng.beta(0.5 * 0.7, 0.5 * 0.3, 40))
        _, low, high = clustered_rate(hits, counts)
        inside.append(low <= 0.7 <= high)
        _, low, high = wilson_interval(int(hits.sum()), int(counts.sum()))
        independent.append(low <= 0.7 <= high)
    assert np.mean(independent) < 0.9 < 0.925 < np.mean(inside) < 0.985


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


@pytest.mark.parametrize("size", [20, 131, 2000])
def test_the_floor_is_the_error_of_right_predictions(size):
    rng = np.random.default_rng(6)
    margins = rng.normal(0, 1.5, size)
    chances = 1 / (1 + np.exp(-margins))
    errors = [calibration(margins, rng.random(size) < chances, bins=10).error for _ in range(400)]
    floor = calibration(margins, np.ones(size), bins=10).floor
    assert floor == pytest.approx(np.mean(errors), rel=0.1)
    assert floor > 0.05 or size == 2000


def test_extreme_margins_stay_in_the_table():
    table = calibration([1e9, -1e9, np.inf], [1, 0, 1], bins=10)
    assert table.error == 0.0 and table.counts.sum() == 3
    with pytest.raises(ValueError, match="at least one pair"):
        calibration([], [], bins=10)


def test_judged_win_rate_by_hand():
    # Both orders: win, loss, tie, torn between, torn between, and a tie beside a win.
    rates = judged_win_rate([0.9, 0.0, 0.5, 1.0, 0.4, 0.5], [0.6, 0.3, 0.5, 0.0, 0.7, 1.0])
    assert rates.win == trinomial_interval(1, 4, 1)
    assert rates.consistent == wilson_interval(3, 6)
    # For the first shown: 1 and 0 (its rival), 0 and 1, ½ and ½, 1 and 1, 0 and 0, ½ and 0.
    assert rates.first_shown == clustered_rate([1, 1, 1, 2, 0, 0.5], [2] * 6)


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


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for samples, right, k in ((4, 1, 1), (6, 2, 3), (6, 0, 2), (5, 4, 2), (6, 6, 6), (7, 1, 7)):
        labels = [i < right for i in range(samples)]
        expected = np.mean([any(some) for some in combinations(labels, k)])
        assert_allclose(pass_at_k([right], samples, k), expected, atol=1e-12)
    assert_allclose(pass_at_k([0, 1000], 10_000, 1), [0.0, 0.1])
    for right, samples, k in (([1], 2, 3), ([3], 2, 1), ([-1], 2, 1), ([1], 2, 0)):
        with pytest.raises(ValueError):
            pass_at_k(right, samples, k)


def test_the_best_of_n_is_the_mean_over_subsets():
    scores = np.random.default_rng(7).normal(size=(3, 7))
    for n in range(1, 8):
        expected = [np.mean([max(some) for some in combinations(row, n)]) for row in scores]
        assert_allclose(best_of_n_mean(scores, n), expected)
    with pytest.raises(ValueError, match="best of 8 cannot be told from 7"):
        best_of_n_mean(scores, 8)


def test_the_value_of_the_best_of_n_is_the_mean_over_subsets_and_over_answers_that_score_alike():
    rng = np.random.default_rng(8)
    scores, values = rng.integers(0, 3, (4, 6)), rng.normal(size=(4, 6))
    for n in range(1, 7):
        expected = []
        for row, worth in zip(scores, values, strict=True):
            subsets = [list(some) for some in combinations(range(6), n)]
            best = [[i for i in some if row[i] == row[some].max()] for some in subsets]
            expected.append(np.mean([worth[some].mean() for some in best]))
        assert_allclose(best_of_n_mean(scores, n, values), expected)
        assert_allclose(best_of_n_mean(scores, n, scores), best_of_n_mean(scores, n))
    with pytest.raises(ValueError, match="do not belong"):
        best_of_n_mean(scores, 2, values[:, :5])


def test_the_kl_of_best_of_n_is_that_of_a_policy_with_many_answers():
    # The best of n of m equally likely answers: P(best is the i-th) = (iⁿ − (i−1)ⁿ)/mⁿ.
    for n in (1, 2, 4, 16):
        steps = np.arange(20_001, dtype=float) / 20_000
        p = np.diff(steps**n)
        exact = np.sum(p[p > 0] * np.log(p[p > 0] * 20_000))
        assert best_of_n_kl(n) == pytest.approx(exact, abs=1e-3) and best_of_n_kl(n) >= exact - 1e-9
