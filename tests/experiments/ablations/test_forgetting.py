"""Numbers beside those of a larger β, and the kinds of prompts."""

import numpy as np
import pytest

from experiments.ablations.forgetting import Variant, beside_beta, both, kind_of, mixed, without
from experiments.ablations.grid_results import Cells

SFT = {"sft_score": 0.0, "sft_left_loss": 1.0, "sft_left_right": 0.6}
PLAIN = [{"score": 4.0, "left_loss": 3.0} | SFT, {"score": 2.0, "left_loss": 1.5} | SFT]


def test_a_prompts_kind_is_its_second_word():
    assert kind_of("kindly sort bat ant") == kind_of("<bos> <user> kindly sort bat ant <assistant> so") == "sort"


def test_rows_of_a_kind_are_taken_apart():
    others, left = without(np.arange(4), ["sort", "find", "sort", "pick"], "sort")
    assert others.tolist() == [1, 3] and left.tolist() == [0, 2]


@pytest.mark.parametrize(("score", "at_that_score"), [(3.0, 2.25), (1.0, 1.25), (5.0, 3.0)])
def test_a_number_stands_beside_that_of_the_beta_with_the_same_proxy(score, at_that_score):
    found = beside_beta("left_loss")({"score": score, "left_loss": 1.2} | SFT, PLAIN)
    assert found == pytest.approx(1.2 - at_that_score)


def test_the_lesser_of_two_shares_above_their_bounds_is_told():
    # (3 − 1.5) / (3 − 1) = 0.75 of the rise is undone; 3.8 / 4 = 0.95 of the gain is kept.
    assert both({"score": 3.8, "left_loss": 1.5} | SFT, PLAIN) == pytest.approx(0.05)


def test_cells_with_demonstrations_are_put_together_seed_by_seed():
    values = {(0, Variant(0.05, 0.0)): PLAIN[0], (0, Variant(0.5, 0.0)): PLAIN[1],
              (0, Variant(0.05, 0.1)): {"score": 3.0, "left_loss": 2.0} | SFT,
              (0, Variant(0.05, 1.0)): {"score": 1.0, "left_loss": 1.0} | SFT,
              (1, Variant(0.05, 0.0)): PLAIN[0]}  # fmt: skip
    cells = Cells((0, 1), tuple({one: None for _, one in values}), values, {})
    # (2 − 2.25) and (1 − 1.25); the second seed has no demonstrations.
    assert mixed(beside_beta("left_loss"), np.mean)(cells) == pytest.approx({0: -0.25})
