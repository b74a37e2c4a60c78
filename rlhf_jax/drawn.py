"""The rankings of each step of a training loop: of those in memory in an order an epoch, or the next of a stream."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.batches import RankedAnswers
from rlhf_jax.data.order import EpochOrder, RankingStream
from rlhf_jax.loop import Loop, set_place


class DrawnRankings:
    """Rankings to train on, so many a step."""

    def __init__(
        self, train: Sequence[RankedAnswers], stream: RankingStream | None, a_step: int, seed: int, loop: Loop
    ) -> None:
        """A stream goes before what is in memory. `loop` has restored its state: the stream goes on from there.

        Raises UserError where the loop's checkpoint has no place in a stream, or one of other data.
        """
        self._train, self._stream = train, None
        if stream is None:
            self._order = EpochOrder([seed, 2], len(train), a_step)
        else:
            self._stream = stream.batches(a_step, seed)
            if 0 < loop.first < loop.steps:
                set_place(self._stream, loop.data_state())

    def parts(self, step: int, count: int) -> list[Sequence[RankedAnswers]]:
        """The rankings of a step in so many equal parts. Steps of a stream are asked for one after the other."""
        if self._stream is not None:
            rankings = next(self._stream)
            size = len(rankings) // count
            return [rankings[n * size : (n + 1) * size] for n in range(count)]
        return [[self._train[i] for i in part] for part in np.split(self._order.rows(step), count)]

    def data_state(self) -> Any:
        """The position in the stream, for a checkpoint; None in memory, where the order follows from the step."""
        return None if self._stream is None else self._stream.get_state()
