"""Numbers of single ablations, against what is known by hand."""

import json

import numpy as np
import pytest

from experiments.ablations.constitution import harden
from experiments.ablations.diversity import expected_distinct
from experiments.ablations.length import gain_at_equal_length, slope_within, worth_of_a_token
from experiments.ablations.reward_data import nearest
from experiments.ablations.verifiable import entropy_law, extreme_share
from rlhf_jax.data.encode import RankedAnswers


def test_distinct_n_grams_over_those_of_random_words():
    # Two words, one text of two: unigrams {0, 1} of an expected 2 · (1 − ¼) = 1.5; the one bigram of an expected 1.
    assert expected_distinct([[0, 1]], 2) == pytest.approx((2 / 1.5 + 1) / 2)
    same, other = [[1, 2, 3, 4, 5, 6]] * 8, [list(row) for row in np.arange(48).reshape(8, 6)]
    assert expected_distinct(same, 100) < 0.2 < 1 < expected_distinct(other, 100)


def test_the_gain_at_equal_length_leaves_length_out():
    before, after = np.repeat([4, 8], [30, 10]), np.repeat([4, 8], [10, 30])
    # A word is worth 0.5, and the policy is 0.1 better at each length: what the rest of its gain is, is length.
    assert gain_at_equal_length(before, after, 0.5 * before, 0.5 * after + 0.1) == pytest.approx((0.1, 1.0))
    gain, share = gain_at_equal_length(before, after + 1, before, after)
    assert np.isnan(gain) and share == 0


def test_a_slope_by_length_is_that_of_a_prompts_own_answers():
    lengths = np.array([1, 2, 3, 4])
    # The second prompt's answers are longer and worse; within both prompts a token is worth 0.5.
    assert slope_within(np.array([0.5, 1.0, -9.0, -8.5]), lengths, 2) == pytest.approx(0.5)


def test_the_worth_of_a_token_is_found_from_pairs():
    rng = np.random.default_rng(0)
    differences = rng.integers(-6, 7, 20_000)
    first = rng.random(20_000) < 1 / (1 + np.exp(-0.3 * differences))
    assert worth_of_a_token(np.where(first, differences, -differences).astype(float)) == pytest.approx(0.3, abs=0.02)


def test_the_std_makes_groups_with_one_right_answer_weigh_more():
    right = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    # |r − mean| sums to 1.5 and 2; over the stds √3/4 and ½ to 2√3 and 4.
    assert extreme_share(right, False) == pytest.approx(1.5 / 3.5)
    assert extreme_share(right, True) == pytest.approx(2 * 3**0.5 / (2 * 3**0.5 + 4), abs=1e-3)


def test_the_entropy_law_finds_its_own_curve():
    entropy = np.linspace(1.5, 0.2, 60)
    found = entropy_law(entropy, 0.9 - 0.15 * np.exp(entropy))
    assert found["law_r2"] == pytest.approx(1.0) and found["law_error"] == pytest.approx(0.0, abs=1e-6)
    assert entropy_law(entropy, 0.1 + 0.15 * np.exp(entropy))["law_r2"] == pytest.approx(-1.0)
    assert entropy_law(entropy, np.where(entropy > 1, 0.3, 0.6))["law_error"] > 0.05


def test_the_nearest_pair_differs_in_the_fewest_places_and_in_one_at_least():
    answers = [[1, 2, 3], [1, 2, 3], [1, 2, 4], [5, 6], [5, 6, 7, 8]]
    assert nearest(RankedAnswers([9], answers, (0, 1, 2, 3, 4), 0.0)) == (0, 2)
    assert nearest(RankedAnswers([9], answers[3:], (0, 1), 0.0)) == (0, 1)


def test_labels_lose_their_doubt_once(tmp_path):
    file = tmp_path / "comparisons.jsonl"
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "probability": p} for p in (0.5,) * 200 + (1.0,) * 200]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    harden(file, np.random.default_rng(0))
    found = [json.loads(line) for line in file.read_text().splitlines()]
    turned = [row["chosen"] == "b" for row in found]
    assert 60 < sum(turned[:200]) < 140 and not any(turned[200:])
    assert all("probability" not in row for row in found)
    before = file.read_text()
    harden(file, np.random.default_rng(1))
    assert file.read_text() == before
