"""Rows that training does not see: a tenth of them, up to a budget. The rest of a large set stays in training."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from rlhf_jax.data.conversations import Conversation

Row = TypeVar("Row")


def held_out(rows: int, budget: int) -> int:
    """How many of so many rows to hold out: a tenth, at most `budget`, at least 1."""
    return max(1, min(rows // 10, budget))


def split_rows(rows: Sequence[Row], *, budget: int, rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
    """(training, held out), both shuffled. Of a single row nothing is left to train on."""
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    cut = held_out(len(rows), budget)
    return shuffled[cut:], shuffled[:cut]


def split_head(rows: Sequence[Row], *, budget: int) -> tuple[list[Row], list[Row]]:
    """(training, held out) of the first rows of a stream, in their order: every tenth is held out, up to `budget`."""
    held = set(range(0, len(rows), 10)[: max(1, budget)])
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def split_by_opening(
    rows: Sequence[Row], openings: Sequence[str], *, budget: int, rng: np.random.Generator
) -> tuple[list[Row], list[Row]]:
    """(training, held out), both in their order; no opening is in both.

    A tenth of the openings is held out with all of their rows, as far as those are at most `budget` rows: an opening
    with more than is left of it stays in training. If none is small enough, the one with the fewest rows is held out.
    """
    sizes: dict[str, int] = {}
    for opening in openings:
        sizes[opening] = sizes.get(opening, 0) + 1
    distinct = sorted(sizes)
    kept: set[str] = set()
    left = budget
    drawn = [distinct[i] for i in rng.permutation(len(distinct))]
    for opening in drawn[: max(1, len(drawn) // 10)]:
        if sizes[opening] <= left:
            kept.add(opening)
            left -= sizes[opening]
    if not kept and drawn:
        kept.add(min(drawn, key=sizes.__getitem__))
    parts = [[row for row, o in zip(rows, openings, strict=True) if (o in kept) == side] for side in (False, True)]
    return parts[0], parts[1]


def opening_of(prompt: Conversation) -> str:
    """The first words of a conversation that are not the system's."""
    return next(turn["content"] for turn in prompt if turn["role"] != "system")
