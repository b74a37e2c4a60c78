"""Sequences whose elements are made when they are asked for: rows of sets that are larger than memory."""

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import numpy as np

T = TypeVar("T")


class Lazy(Sequence[T]):
    """A sequence whose elements are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], T]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> "Lazy[T]": ...
    def __getitem__(self, number: int | slice) -> "T | Lazy[T]":
        at = range(self._count)[number]
        return picked(self, at) if isinstance(at, range) else self._make(at)


def picked(rows: Sequence[T], numbers: Sequence[int] | np.ndarray) -> Lazy[T]:
    """Some of the rows, in the order of their numbers."""
    return Lazy(len(numbers), lambda at: rows[numbers[at]])


def joined(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """The rows of all parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([len(part) for part in parts])

    def make(at: int) -> T:
        part = int(np.searchsorted(ends, at, side="right"))
        return parts[part][at - int(ends[part]) + len(parts[part])]

    return Lazy(int(ends[-1]), make)
