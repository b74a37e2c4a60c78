"""Policies at an equal KL, and labels dealt again."""

import numpy as np
import pytest

from experiments.ablations.grid_results import Cells
from experiments.ablations.online import Config, Variant, ahead, at_distance, deal_again
from experiments.iterate import write_lines
from rlhf_jax.errors import UserError
from rlhf_jax.row_file import read_rows

CURVES = {
    "online": {"nats": [0.0, 2.0, 1.0, 4.0], "utility": [1.0, 2.0, 9.0, 3.0]},
    "offline": {"nats": [0.0, 1.0, 3.0], "utility": [1.0, 1.5, 1.0]},
}


@pytest.mark.parametrize(("nats", "utility"), [(0.0, 1.0), (1.0, 1.5), (2.0, 2.0), (2.5, 6.0), (4.0, 3.0)])
def test_true_utility_is_read_where_the_distance_is_first_reached(nats, utility):
    kl, y = (np.array(CURVES["online"][name]) for name in ("nats", "utility"))
    assert at_distance(kl, y, nats) == pytest.approx(utility)


def test_a_distance_that_is_never_reached():
    with pytest.raises(ValueError, match="never 5"):
        at_distance(np.array([0.0, 4.0]), np.array([1.0, 2.0]), 5.0)


def test_plans_are_compared_at_the_largest_distance_that_both_reach():
    variants = tuple(Variant(plan) for plan in CURVES)
    cells = Cells((7,), variants, {(7, Variant(plan)): curves for plan, curves in CURVES.items()}, {})
    found = ahead({"plan": "online"}, {"plan": "offline"})(cells)
    assert found == {7: pytest.approx(5.0 - 1.0)}  # at 3 nats, between (1, 9) and (4, 3)
    with pytest.raises(KeyError):
        ahead({"plan": "online"}, {"plan": "shuffled"})(cells)


def test_labels_are_dealt_again_each_once(tmp_path):
    for number in (1, 2):
        file = tmp_path / "online" / f"round-{number}" / "comparisons.jsonl"
        file.parent.mkdir(parents=True)
        write_lines(file, [{"row": 10 * number + place} for place in range(5)])
    (tmp_path / "shuffled").mkdir()
    deal_again(tmp_path / "online", tmp_path / "shuffled", 2, 0)
    dealt = [[row["row"] for row in read_rows(tmp_path / "shuffled" / f"round-{n}" / "comparisons.jsonl")]
             for n in (1, 2)]  # fmt: skip
    assert [len(part) for part in dealt] == [5, 5] and sorted(dealt[0] + dealt[1]) == [*range(10, 15), *range(20, 25)]
    assert {row // 10 for row in dealt[0]} == {1, 2}
    with pytest.raises(UserError, match="3 rounds"):
        deal_again(tmp_path / "online", tmp_path / "shuffled", 3, 0)


def test_shuffled_comes_after_online():
    with pytest.raises(UserError, match="before it"):
        Config(plans=("shuffled", "online"))
