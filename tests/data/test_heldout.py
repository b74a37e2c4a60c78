"""What is held out: a tenth up to a budget, the same for the same seed, and no opening on both sides."""

import numpy as np
import pytest

from rlhf_jax.data.heldout import (
    _place,
    held_out,
    key_of,
    opening_of,
    split_by_hash,
    split_by_opening,
    split_head,
    split_rows,
)


@pytest.mark.parametrize(
    ("rows", "budget", "expected"),
    [(1, 5, 1), (9, 5, 1), (19, 5, 1), (20, 5, 2), (50, 5, 5), (1000, 5, 5), (1000, 500, 100), (1000, 0, 1)],
)
def test_a_tenth_up_to_the_budget_and_at_least_one(rows, budget, expected):
    assert held_out(rows, budget) == expected


def draw(split, *args, seed=0, **kwargs):
    return tuple(list(part) for part in split(*args, rng=np.random.default_rng(seed), **kwargs))


@pytest.mark.parametrize(("budget", "count"), [(100, 20), (7, 7)])
def test_rows_are_split_at_random_and_none_is_lost(budget, count):
    rows = [f"row {n}" for n in range(200)]
    train, held = draw(split_rows, rows, budget=budget)
    assert len(held) == count and sorted(train + held) == sorted(rows)
    assert draw(split_rows, rows, budget=budget) == (train, held) != draw(split_rows, rows, seed=1, budget=budget)
    # A smaller budget holds out some of the same rows, and the rest stays in training.
    assert draw(split_rows, rows, budget=3)[1] == held[:3]


@pytest.mark.parametrize(("rows", "budget", "expected"), [(25, 9, [0, 10, 20]), (25, 2, [0, 10]), (3, 9, [0])])
def test_of_a_streams_head_every_tenth(rows, budget, expected):
    train, held = split_head(range(rows), budget=budget)
    assert held == expected and train == [n for n in range(rows) if n not in expected]


def test_no_opening_is_on_both_sides():
    openings = [f"opening {n % 70}" for n in range(210)]
    rows = list(range(210))
    train, held = draw(split_by_opening, rows, openings, budget=1000)
    assert sorted(train + held) == rows and train == sorted(train) and held == sorted(held)
    sides = [{openings[row] for row in part} for part in (train, held)]
    assert not sides[0] & sides[1] and len(sides[1]) == 7 and len(held) == 21
    assert draw(split_by_opening, rows, openings, budget=1000) == (train, held)
    assert draw(split_by_opening, rows, openings, budget=1000, seed=1) != (train, held)
    # Three rows an opening: a budget of 10 is three openings, which were held out before too.
    train, fewer = draw(split_by_opening, rows, openings, budget=10)
    assert len(fewer) == 9 and set(fewer) < set(held) and sorted(train + fewer) == rows


def test_what_was_trained_on_is_not_held_out_when_there_are_more_rows():
    openings = [key_of(f"opening {n // 2}") for n in range(4000)]
    train, held = split_by_hash(range(1000), openings[:1000], budget=10_000)
    more_train, more_held = split_by_hash(range(4000), openings, budget=10_000)
    assert set(train) < set(more_train) and set(held) < set(more_held)
    assert 60 < len(held) < 140 and 320 < len(more_held) < 480 and not set(more_train) & set(more_held)
    assert not {openings[row] for row in more_train} & {openings[row] for row in more_held}
    # A budget lets some go to training, and takes none from there.
    few = split_by_hash(range(4000), openings, budget=40)[1]
    assert len(few) == 40 and set(few) < set(more_held)
    # Openings grow unequally, and the budget has no room for all that are held out: none comes from training.
    sizes = np.random.default_rng(0).integers(1, 9, (4, 300))
    before: set[str] = set()
    for count in range(1, 5):
        grown = [key_of(f"opening {n}") for n, times in enumerate(sizes[:count].sum(axis=0)) for _ in range(times)]
        left, out = ({grown[row] for row in part} for part in split_by_hash(range(len(grown)), grown, budget=60))
        assert out and not out & before
        before |= left
    # The second of three grows past the budget: the third, which was trained on, does not take its place.
    small, grows, trained = sorted((key_of(f"opening {n}") for n in range(300)), key=_place)[:3]
    for times, expected in ((8, {small, grows}), (9, {small})):
        grown = [small] * 2 + [grows] * times + [trained] * 5
        assert {grown[row] for row in split_by_hash(range(len(grown)), grown, budget=10)[1]} == expected
    # None of these is in the tenth by itself.
    none = [row for row in more_train if row % 2 == 0][:5]
    assert len(split_by_hash(none, [openings[row] for row in none], budget=9)[1]) == 1


def test_an_opening_that_is_larger_than_the_budget_stays_in_training():
    openings = ["often"] * 50 + ["twice"] * 2 + ["thrice"] * 3
    for seed in range(5):
        train, held = draw(split_by_opening, range(55), openings, budget=5, seed=seed)
        assert 2 <= len(held) <= 3 and len(train) + len(held) == 55
        # Where every opening is larger, the smallest is held out.
        assert draw(split_by_opening, range(55), openings, budget=1, seed=seed)[1] == [50, 51]
    assert draw(split_by_opening, [1, 2], ["one", "one"], budget=5) == ([], [1, 2])


def test_an_opening_is_what_the_user_says_first():
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    assert opening_of(tuple(turns)) == opening_of(tuple(turns[1:])) == "user"
