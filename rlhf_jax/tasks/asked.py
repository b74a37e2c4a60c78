"""Prompts of files as they are answered: with a text behind them, in the room that an answer leaves, left-padded."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.batches import Prompts
from rlhf_jax.data.lazy import Lazy, joined, picked
from rlhf_jax.data.rows import Read, as_prompt, parse_columns, prompt_text, with_suffix
from rlhf_jax.data.store import Stored
from rlhf_jax.data.tokens import bucket, padded_when_asked
from rlhf_jax.tasks.task import PromptRow


class Asked(NamedTuple):
    """How prompts are made of the rows of a file."""

    columns: tuple[str, ...] = ()
    """OURS=THEIRS."""
    suffix: str = ""
    """Text put behind each prompt."""

    def read(self, read: Read) -> Read:
        """The prompt of a row, whatever else the row has."""
        return Read(read.number, with_suffix(as_prompt(read), self.suffix), read.fields)

    def row(self, asked: Read) -> PromptRow:
        """The row of such a prompt, as rewards get it."""
        return PromptRow(prompt_text(asked, parse_columns(self.columns).get("prompt", "prompt")), asked.fields)


def lay_prompts(
    rows: Stored,
    asked: Asked,
    encode: Callable[[Iterator[Read]], Stored],
    *,
    encoded: bool,
    length: int,
    width: int | None = None,
    pad_id: int,
) -> tuple[Prompts, Sequence[PromptRow]]:
    """Left-padded prompts, each with its row; none has more than `length` tokens.

    They have so many columns as `width` says, by default the `bucket` of the longest.
    `encode(prompts)` encodes those that the rows do not have: all of them unless the rows' ids are those of prompts
    (`encoded`), and those that are too long, which lose turns. Of the others there are none.
    """
    sizes = np.fromiter(map(len, rows.ids), int, len(rows.ids)) if encoded else np.full(len(rows.ids), length + 1)
    numbers, others = (np.flatnonzero(some) for some in (sizes <= length, sizes > length))
    ids: Sequence[Any] = picked(rows.ids, numbers)
    longest = int(sizes[numbers].max(initial=0))
    if len(others):
        again = encode(asked.read(rows.reads[n])._replace(number=n) for n in map(int, others))
        ids, longest = joined([ids, again.ids]), max(longest, *map(len, again.ids), 0)
        found = np.fromiter((read.number for read in again.reads), int, len(again.ids))
        numbers = np.concatenate([numbers, found])
    order = np.argsort(numbers)
    ids, places = picked(ids, order), numbers[order]

    def row(at: int) -> PromptRow:
        return asked.row(asked.read(rows.reads[int(places[at])]))

    width = width or bucket(longest, longest=length)
    return padded_when_asked(ids, length=width, pad_id=pad_id), Lazy(len(places), row)
