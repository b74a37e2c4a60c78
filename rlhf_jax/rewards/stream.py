"""Scores answers that have ended while others are still sampled."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import numpy as np

from rlhf_jax.batches import Ended
from rlhf_jax.rewards.reward import HostScores, Part

Score = Callable[[Part, Ended], dict[str, HostScores]]
"""score(part, ended) -> name -> findings on these answers."""


class Stream:
    """Where a sampler leaves answers as they end, and a thread takes them up. One batch at a time."""

    def __init__(self) -> None:
        self._arrived: SimpleQueue[Ended | None] = SimpleQueue()

    def put(self, ended: Ended) -> None:
        """Adds answers; does not wait for anything."""
        self._arrived.put(ended)

    @contextmanager
    def scored(self, score: Score, count: int) -> Iterator[Future[list[tuple[Part, dict[str, HostScores]]]]]:
        """Scores a batch of `count` answers as they are put, while the `with` lasts, all that are there at a time.

        The future's result, after the `with`, are the parts that the batch was scored in; what `score` raises is
        raised there. Where the `with` is left by an exception, what has not been scored is not.
        """
        with ThreadPoolExecutor(1) as threads:
            self._arrived = SimpleQueue()
            future = threads.submit(_score_all, self._arrived, score, count)
            try:
                yield future
            except BaseException:
                self._arrived.put(None)
                raise


def _score_all(
    arrived: "SimpleQueue[Ended | None]", score: Score, count: int
) -> list[tuple[Part, dict[str, HostScores]]]:
    parts: list[tuple[Part, dict[str, HostScores]]] = []
    left = count
    while left:
        some = _all_there(arrived)
        if None in some:
            break
        ended = Ended(*(np.concatenate(each) for each in zip(*filter(None, some), strict=True)))
        left -= len(ended.rows)
        part = Part(ended.rows, count)
        parts.append((part, score(part, ended)))
    return parts


def _all_there(arrived: "SimpleQueue[Ended | None]") -> Sequence[Ended | None]:
    """Takes all that has arrived, at least one."""
    some = [arrived.get()]
    while True:
        try:
            some.append(arrived.get_nowait())
        except Empty:
            return some
