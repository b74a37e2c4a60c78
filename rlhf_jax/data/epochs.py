"""Batches of rows that are in memory."""

from collections.abc import Iterator

import numpy as np

from rlhf_jax.batches import Tokens
from rlhf_jax.data.order import EpochOrder
from rlhf_jax.data.tokens import take
from rlhf_jax.sharding import host_share


class EpochBatches(Iterator[Tokens]):
    """Endless batches of rows that are in memory, in another order each epoch; each process has rows of its own.

    A batch has at most as many rows as there are. Rows that are left over at an epoch's end are left out of it.
    """

    def __init__(self, tokens: Tokens, batch_size: int, seed: int) -> None:
        rows = len(tokens.mask)
        self._tokens, self._step = tokens, 0
        self._order = EpochOrder([seed, 1], rows, min(batch_size, rows))

    def __next__(self) -> Tokens:
        rows = self._order.rows(self._step)
        self._step += 1
        number, count = host_share()
        return take(self._tokens, np.split(rows, count)[number])

    def get_state(self) -> int:
        """How many batches were given: a JSON value."""
        return self._step

    def set_state(self, state: int) -> None:
        """Goes on after so many batches."""
        self._step = state
