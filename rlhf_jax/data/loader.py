"""Documents -> packed batches through grain: shuffled, shared out among hosts, and resumed at the exact example.

batches = document_batches([documents], batch_size=8, length=512, pad_id=0, seed=0)
tokens = next(batches)
state = batches.get_state()          # a JSON value; batches.set_state(state) goes on from there
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import WindowShuffleIterDataset

from rlhf_jax.batches import Tokens
from rlhf_jax.data.tokens import Document, lay, size
from rlhf_jax.errors import UserError

Shard = tuple[int, int]
"""(number of this host, number of hosts)."""
Open = Callable[[int], Iterator[tuple[int, Document]]]
"""open(start) -> (number of the source's row, its document) of the usable rows from number `start` on."""


def document_batches(
    sources: Sequence[Sequence[Document]],
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    seed: int,
    weights: Sequence[float] | None = None,
    shard: Shard = (0, 1),
) -> grain.DatasetIterator[Tokens]:
    """Endless `Tokens` [batch_size, length] of documents in memory, reshuffled in every epoch.

    Several sources are mixed by `weights` (by default as large as they are), each in epochs of its own. Every
    host sees its share of each epoch, and all of them together see each document once.
    """
    index, count = shard
    mixed = []
    for number, documents in enumerate(sources):
        if len(documents) < count:
            raise UserError(f"{len(documents)} documents are too few for {count} hosts")
        shuffled = grain.MapDataset.source(documents).shuffle(seed=_seed(seed, number))
        mixed.append(shuffled[index::count].repeat())
    weights = _weights([float(len(documents)) for documents in sources] if weights is None else weights, sources)
    everything = mixed[0] if len(mixed) == 1 else grain.MapDataset.mix(mixed, weights=weights)
    one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
    return iter(_Pack(everything.to_iter_dataset(one), batch_size, length, pad_id))


def streamed_batches(
    sources: Sequence[Open],
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    seed: int,
    weights: Sequence[float] | None = None,
    shard: Shard = (0, 1),
    window: int = 1024,
) -> grain.DatasetIterator[Tokens]:
    """As `document_batches` for sources that are not in memory: shuffled within a window, and read again and again.

    A host reads every row of its sources and keeps those of its share.
    """
    mixed = [
        WindowShuffleIterDataset(_Rows(open_source, shard), window_size=window, seed=_seed(seed, number))
        for number, open_source in enumerate(sources)
    ]
    weights = _weights([1.0] * len(mixed) if weights is None else weights, sources)
    everything = mixed[0] if len(mixed) == 1 else grain.IterDataset.mix(mixed, weights=weights)
    return iter(_Pack(everything, batch_size, length, pad_id))


def mix_once(sources: Sequence[Sequence[Any]], weights: Sequence[float], *, seed: int) -> list[Any]:
    """As many elements in these proportions as there are without repeating one, each source shuffled."""
    shuffled = [
        grain.MapDataset.source(elements).shuffle(seed=_seed(seed, number)) for number, elements in enumerate(sources)
    ]
    return list(grain.MapDataset.mix(shuffled, weights=_weights(weights, sources)))


def _seed(seed: int, number: int) -> int:
    return int(np.random.default_rng([seed, 3, number]).integers(2**31))


def _weights(weights: Sequence[float], sources: Sequence[Any]) -> list[float]:
    if len(weights) != len(sources):
        raise UserError(f"{len(weights)} weights for {len(sources)} sources")
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError("the weight of a source must be a number above 0")
    return [float(weight) for weight in weights]


class _Rows(grain.IterDataset):
    """Documents of a source that is read from its beginning again whenever it ends."""

    def __init__(self, open_source: Open, shard: Shard):
        super().__init__()
        self._open, self._shard = open_source, shard

    def __iter__(self) -> "_RowsIterator":
        return _RowsIterator(self._open, self._shard)


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, open_source: Open, shard: Shard):
        super().__init__()
        self._open, self._shard = open_source, shard
        self._row = 0
        self._rows: Iterator[tuple[int, Document]] | None = None

    def __next__(self) -> Document:
        index, count = self._shard
        empty = 0
        while True:
            if self._rows is None:
                self._rows = self._open(self._row)
            for number, document in self._rows:
                self._row = number + 1
                if number % count == index:
                    return document
            # A second pass that finds nothing either: there is nothing for this host.
            empty += 1
            if empty > 1:
                raise UserError("a streamed source has no row that can be used")
            self._row, self._rows = 0, None

    def get_state(self) -> dict[str, int]:
        return {"row": self._row}

    def set_state(self, state: dict[str, int]) -> None:
        self._row, self._rows = state["row"], None


class _Pack(grain.IterDataset):
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
