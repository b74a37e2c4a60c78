"""Rows that training does not see: a tenth of them, up to a budget. The rest of a large set stays in training."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from rlhf_jax.data.conversations import Conversation
from rlhf_jax.data.formats import Text
from rlhf_jax.data.lazy import picked

Row = TypeVar("Row")


def held_out(rows: int, budget: int) -> int:
    """How many of so many rows to hold out: a tenth, at most `budget`, at least 1."""
    return max(1, min(rows // 10, budget))


def split_rows(rows: Sequence[Row], *, budget: int, rng: np.random.Generator) -> tuple[Sequence[Row], Sequence[Row]]:
    """(training, held out), both shuffled. Of a single row nothing is left to train on."""
    shuffled = rng.permutation(len(rows))
    cut = held_out(len(rows), budget)
    return picked(rows, shuffled[cut:]), picked(rows, shuffled[:cut])


def split_head(rows: Sequence[Row], *, budget: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """(training, held out) of the first rows of a stream, in their order: every tenth is held out, up to `budget`."""
    held = set(range(0, len(rows), 10)[: max(1, budget)])
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def split_by_opening(
    rows: Sequence[Row], openings: Sequence[str], *, budget: int, rng: np.random.Generator
) -> tuple[Sequence[Row], Sequence[Row]]:
    """(training, held out), both in their order; no opening is in both.

    A tenth of the openings is held out with all of their rows, as far as those are at most `budget` rows: an opening
    with more than is left of it stays in training. If none is small enough, the one with the fewest rows is held out.
    """
    distinct = sorted(set(openings))
    drawn = [distinct[i] for i in rng.permutation(len(distinct))]
    return _part(rows, openings, drawn[: max(1, len(drawn) // 10)], drawn, budget)


def split_by_hash(rows: Sequence[Row], openings: Sequence[str], *, budget: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """`split_by_opening` for rows that grow: with more of them, what was trained on is not held out later.

    Openings are given by `key_of`.

    About a tenth of the openings is held out, those with the least hash, up to the first one for which the budget has
    no room. Those that it has no room for any more are trained on later. Where none can be held out so, the opening
    with the fewest rows is, and that may be another one when there are more rows.
    """
    sizes, left = Counter(openings), budget
    places = {opening: _place(opening) for opening in sizes}
    candidates = []
    for opening in sorted(sizes, key=lambda opening: places[opening]):
        left -= sizes[opening]
        if places[opening] >= 0.1 or left < 0:
            break
        candidates.append(opening)
    return _part(rows, openings, candidates, sorted(sizes, key=lambda opening: places[opening]), budget)


def _place(opening: str) -> float:
    """A number from 0 to 1 that depends on the opening alone."""
    return int(opening, 16) / 2**64


def _part(
    rows: Sequence[Row], openings: Sequence[str], candidates: Sequence[str], order: Sequence[str], budget: int
) -> tuple[Sequence[Row], Sequence[Row]]:
    """(training, held out): the candidates with all of their rows while the budget lasts, and at least one opening."""
    sizes = Counter(openings)
    kept: set[str] = set()
    for opening in candidates:
        if sizes[opening] <= budget:
            kept.add(opening)
            budget -= sizes[opening]
    if not kept and order:
        kept.add(min(order, key=sizes.__getitem__))
    held = np.fromiter((opening in kept for opening in openings), bool, len(rows))
    train, out = (picked(rows, np.flatnonzero(side)) for side in (~held, held))
    return train, out


def opening_of(prompt: Conversation) -> str:
    """The first words of a conversation that are not the system's."""
    return next(turn["content"] for turn in prompt if turn["role"] != "system")


def opening_of_row(row: Any) -> str:
    """16 hexadecimal digits for the opening of a row, one of the forms of `formats`; of a text, for all of it.

    A hash, for a million openings would fill the memory.
    """
    return key_of(row.text if isinstance(row, Text) else opening_of(row.prompt))


def key_of(opening: str) -> str:
    """The first 16 hexadecimal digits of an opening's SHA-256."""
    return hashlib.sha256(opening.encode("utf-8", "surrogatepass")).hexdigest()[:16]
