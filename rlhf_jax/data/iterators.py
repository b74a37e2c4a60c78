"""The iterators that `loader.py` adds to grain: a source that is read again and again, and packed batches.

They stand apart from it because grain takes half a second to import and their classes are made from grain's.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np

from rlhf_jax.batches import Tokens
from rlhf_jax.data.tokens import Document, lay, size
from rlhf_jax.errors import UserError


class Pass(NamedTuple):
    """A reading of a source from its beginning to its end."""

    number: int
    order: int
    """A seed for the order of its files; every host has the same."""
    shard: tuple[int, int]
    """(number of this host, number of hosts): it wants the rows whose number leaves its own when divided by theirs."""


Open = Callable[[int, Pass], Iterator[tuple[int, Any]]]
"""open(start, pass) -> (number of the row, its ids) of the usable rows of its shard, from number `start` on."""


class Rows(grain.IterDataset):
    """Rows of a source that is read from its beginning again whenever it ends."""

    def __init__(self, open_source: Open, shard: tuple[int, int], seed: int):
        super().__init__()
        self._source = open_source, shard, seed

    def __iter__(self) -> "_RowsIterator":
        return _RowsIterator(*self._source)


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, open_source: Open, shard: tuple[int, int], seed: int):
        super().__init__()
        self._open, self._shard, self._seed = open_source, shard, seed
        self._row, self._pass = 0, 0
        self._rows: Iterator[tuple[int, Any]] | None = None

    def __next__(self) -> Any:
        empty = 0
        while True:
            if self._rows is None:
                order = int(np.random.default_rng([self._seed, self._pass]).integers(2**31))
                self._rows = self._open(self._row, Pass(self._pass, order, self._shard))
            for number, ids in self._rows:
                self._row = number + 1
                return ids
            # A second pass that finds nothing either: there is nothing for this host.
            empty += 1
            if empty > 1:
                raise UserError("a streamed source has no row that can be used")
            self._row, self._pass, self._rows = 0, self._pass + 1, None

    def get_state(self) -> dict[str, int]:
        return {"row": self._row, "pass": self._pass}

    def set_state(self, state: dict[str, int]) -> None:
        self._row, self._pass, self._rows = state["row"], state["pass"], None


class Packs(grain.IterDataset):
    """Batches of `batch_size` rows, filled first fit until a document fits into none of them."""

    def __init__(self, parent: grain.IterDataset, batch_size: int, length: int, pad_id: int):
        super().__init__(parent)
        self._sizes = batch_size, length, pad_id

    def __iter__(self) -> "_PackIterator":
        return _PackIterator(iter(self._parent), *self._sizes)


class _PackIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, batch_size: int, length: int, pad_id: int):
        super().__init__(parent)
        self._batch_size, self._length, self._pad_id = batch_size, length, pad_id
        self._left: Document | None = None
        """The document that opens the next batch."""
        self._state: dict[str, Any] = {"parent": parent.get_state(), "skip": 0}

    def __next__(self) -> Tokens:
        rows: list[list[Document]] = [[] for _ in range(self._batch_size)]
        room = [self._length] * self._batch_size
        # The parent's state is asked for once a batch, for it is slow. A resume reads this batch's documents again,
        # all but the last of them in vain: that one opens the next batch.
        parent, read = self._parent.get_state(), 0
        while True:
            if self._left is None:
                self._left = next(self._parent)
                read += 1
            needed = size(self._left)
            if needed > self._length:
                raise ValueError(f"a document of {needed} tokens in rows of {self._length}")
            row = next((r for r in range(self._batch_size) if room[r] >= needed), None)
            if row is None:
                self._state = {"parent": parent, "skip": read - 1}
                return lay(rows, self._length, self._pad_id)
            rows[row].append(self._left)
            room[row] -= needed
            self._left = None

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        for _ in range(state["skip"]):
            next(self._parent)
        self._state, self._left = state, None
