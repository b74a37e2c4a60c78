import numpy as np
import pytest

from rlhf_jax.evaluate import judged_win_rate
from rlhf_jax.rewards.judge import both_orders, comparison


def longer(prompts, first, second):
    lengths = np.array([[len(a), len(b)] for a, b in zip(first, second, strict=True)])
    return (1 + np.sign(lengths[:, 0] - lengths[:, 1])) / 2


def test_a_judge_of_length_is_consistent():
    verdicts = both_orders(longer, ["?"] * 3, ["aa", "a", "a"], ["a", "a", "aa"])
    np.testing.assert_array_equal(verdicts.shown_first, [1.0, 0.5, 0.0])
    np.testing.assert_array_equal(verdicts.shown_second, [1.0, 0.5, 0.0])
    rates = judged_win_rate(*verdicts)
    assert rates.win.rate == 0.5 and rates.consistent.rate == 1.0 and rates.first_shown.rate == 0.5


def test_a_judge_who_takes_the_first_finds_no_winner():
    rates = judged_win_rate(*both_orders(lambda p, a, b: [1] * len(p), ["?"] * 4, ["a"] * 4, ["b"] * 4))
    assert rates.win.rate == 0.5 and rates.consistent.rate == 0.0 and rates.first_shown.rate == 1.0


@pytest.mark.parametrize("verdicts", [[1.0], [0.5, np.nan], [0.5, 2.0], [[0.5, 0.5]]])
def test_a_judge_who_says_something_else_is_refused(verdicts):
    with pytest.raises(ValueError, match="answer 2 prompts"):
        both_orders(lambda p, a, b: verdicts, ["?"] * 2, ["a"] * 2, ["b"] * 2)


def test_the_question_shows_both_in_order():
    text = comparison("Why?", "Because one.", "Because two.")
    assert text.index("Why?") < text.index("Because one.") < text.index("Response B") < text.index("Because two.")
