"""What is watched: numbers by hand, and trends that noise and wild values do not fool."""

import numpy as np
import pytest

from rlhf_jax.rewards.watch import DIRECTIONS, answer_metrics, climbs_while_falls, repetition, trend

RNG = np.random.default_rng(0)
LINE = np.linspace(0, 1, 100)


def test_metrics_by_hand():
    answers = [[1, 2], [1, 2], [1, 2], [3], []]
    metrics = answer_metrics(["p", "p", "q", "q", "q"], answers, [True, True, False, True, False], n=2)
    assert metrics == pytest.approx(
        # Of the four pairs that differ, (p, 12), (q, 12), (q, 3), (q, -), one has an answer that another has, too.
        {"length": 7 / 5, "ended": 3 / 5, "distinct": 3 / 5, "copies": 1 / 4, "repetition": 0.0}
    )
    assert DIRECTIONS.keys() <= metrics.keys()


@pytest.mark.parametrize(
    "answers, n, expected",
    [
        (["abcd"], 2, 0.0),
        (["aaaa"], 2, 2 / 3),
        (["ababab"], 2, 3 / 5),  # ab ba ab ba ab: two of five are new
        (["aaaa", "abcd"], 2, 1 / 3),
        (["abab", "abab"], 3, 0.0),  # the same in two answers is no repetition
        (["a", ""], 2, 0.0),
        ([["a", "b", "a", "b", "a"]], 3, 1 / 3),
    ],
)
def test_repetition(answers, n, expected):
    assert repetition(answers, n) == pytest.approx(expected)


def test_answers_that_are_none_or_do_not_match():
    with pytest.raises(ValueError, match="no answers"):
        answer_metrics([], [], [])
    with pytest.raises(ValueError, match="shape"):
        answer_metrics(["p"], ["a"], [True, False])
    with pytest.raises(ValueError, match="longer"):
        answer_metrics(["p"], ["a", "b"], [True, False])


def spoiled(series):
    wild = series.copy()
    wild[[60, 75, 90]] = [1e6, -1e6, np.nan]
    return wild


@pytest.mark.parametrize(
    "series, expected",
    [
        (LINE, 1),
        (-LINE, -1),
        (np.ones(100), 0),
        (0.1 + 1e-12 * LINE, 0),  # as rounding may leave a constant
        (LINE + 0.05 * RNG.normal(size=100), 1),
        (LINE + 10 * RNG.normal(size=100), 0),
        (spoiled(LINE), 1),
        (np.concatenate([LINE, np.ones(100)]), 0),  # only the last half counts
        (np.concatenate([np.ones(100), -LINE]), -1),
        (np.arange(15.0), 1),
        (np.arange(14.0), 0),  # 7 points
        (np.linspace(0, 1, 5000) + 0.1 * RNG.normal(size=5000), 1),
        ([], 0),
    ],
)
def test_trend(series, expected):
    assert trend(series) == expected


@pytest.mark.parametrize("size, most", [(16, 40), (100, 8), (400, 4)])
def test_noise_is_seldom_a_trend(size, most):
    rng = np.random.default_rng(1)
    assert sum(trend(rng.normal(size=size)) != 0 for _ in range(400)) <= most


@pytest.mark.parametrize(
    "reward, watched, expected",
    [(LINE, -LINE, True), (LINE, LINE, False), (-LINE, -LINE, False), (LINE, 0 * LINE, False)],
)
def test_the_reward_climbs_while_what_is_watched_falls(reward, watched, expected):
    assert climbs_while_falls(reward, watched) is expected
