"""The order in which rows are drawn: each once an epoch, another order each epoch, found again from the step alone.

Or one after the other, of a stream.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from rlhf_jax.batches import Prompts, RankedAnswers

if TYPE_CHECKING:
    import grain

PromptStream = Callable[[int, int], "grain.DatasetIterator[tuple[Prompts, Sequence[Any]]]"]
"""stream(batch_size, seed): endless batches of prompts that are read as they are needed, each with the rows that its
`row` numbers from 0; every process reads all of them."""


class RankingStream(NamedTuple):
    """Rankings that are read as they are needed, each with a best and a worst answer."""

    batches: "Callable[[int, int], grain.DatasetIterator[list[RankedAnswers]]]"
    """batches(batch_size, seed): endless batches; every process reads all of them."""
    length: int
    """The most tokens of an answer with its prompt."""


class EpochOrder:
    """Batches of `batch_size` of the numbers 0 … rows − 1.

    Rows that are left over at an epoch's end are left out of that epoch. The same `seed` gives the same order.
    """

    def __init__(self, seed: Sequence[int], rows: int, batch_size: int) -> None:
        self._seed, self._rows, self._batch_size = list(seed), rows, batch_size
        self._epoch, self._order = -1, np.arange(0)

    def rows(self, step: int) -> Int[np.ndarray, " B"]:
        """The numbers of the rows of one step, steps counted from 0."""
        epoch, at = divmod(step, self._rows // self._batch_size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([*self._seed, epoch]).permutation(self._rows)
        return self._order[at * self._batch_size : (at + 1) * self._batch_size]
