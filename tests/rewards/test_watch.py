"""What is watched: numbers by hand."""

import pytest

from rlhf_jax.rewards.watch import DIRECTIONS, answer_metrics, repetition


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
