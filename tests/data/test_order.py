"""Rows are drawn once an epoch, in another order each epoch, found again from the step alone."""

import numpy as np

from rlhf_jax.data.order import EpochOrder


def test_each_row_once_an_epoch_and_another_order_in_the_next():
    order = EpochOrder([7, 1], 12, 4)
    epochs = [np.concatenate([order.rows(step) for step in range(e * 3, e * 3 + 3)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_a_resumed_run_draws_what_the_other_would_have():
    straight = [EpochOrder([7, 1], 10, 3).rows(step).tolist() for step in range(9)]
    order = EpochOrder([7, 1], 10, 3)
    assert [order.rows(step).tolist() for step in (7, 2, 8)] == [straight[step] for step in (7, 2, 8)]
    # Ten rows in batches of three: one is left out of each epoch, another one in the next.
    used = [{row for step in straight[e * 3 : e * 3 + 3] for row in step} for e in range(3)]
    assert all(len(some) == 9 for some in used) and len({frozenset(some) for some in used}) > 1
    assert EpochOrder([8, 1], 10, 3).rows(0).tolist() != straight[0]
