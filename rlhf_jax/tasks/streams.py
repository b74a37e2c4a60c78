"""Demonstrations that are read as they are needed: of each source the first ones at once, the others in passes."""

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlhf_jax.data.encode import encode_rows
from rlhf_jax.data.heldout import split_head
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.data.rows import Read
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase
from rlhf_jax.data.tokens import Document

if TYPE_CHECKING:
    from rlhf_jax.data.iterators import Pass

STREAM_HEAD = 2560
"""Documents at the beginning of a source of which some are held out."""


class StreamedSource:
    """A source of demonstrations, some of whose first rows are held out, whatever the order of a pass is."""

    def __init__(
        self,
        rows: Callable[..., Iterator[Read]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        budget: int,
        counted: Rejects,
        in_order: bool,
    ) -> None:
        """`rows(rejects, …)` is `read_rows` of the source. At most `budget` rows, and at most a tenth, are held out.

        `counted` hears of the rows that cannot be used, in the first pass. `in_order`: all passes have one order of
        files. Raises UserError for a source that cannot be read.
        """
        self._rows, self._max_length, self._counted, self._in_order = rows, max_length, counted, in_order
        policy = counted.policy
        begin = encode_rows(rows(Rejects(policy)), tokenizer, max_length, Rejects(policy))
        kept, out = split_head([(read.row.place, ids) for read, ids in islice(begin, STREAM_HEAD)], budget=budget)
        self.head: list[Document] = [ids for _, ids in kept]
        self.validation: list[Document] = [ids for _, ids in out]
        self._heldout = {place for place, _ in out}
        self._tokenizer: Any = copy.deepcopy(tokenizer)  # a thread of its own reads each source

    def open(self, start: int, one: "Pass") -> Iterator[tuple[int, Document]]:
        """(number, ids) of a pass's rows from number `start` on, without those that are held out."""
        rejects = self._counted if one.number == 0 else Rejects("skip")
        rows = self._rows(rejects, start=start, order=None if self._in_order else one.order, shard=one.shard)
        for read, ids in encode_rows(rows, self._tokenizer, self._max_length, rejects):
            if read.row.place not in self._heldout:
                yield read.number, ids
