"""The rankings or prompts of each step of a training loop: some of those in memory, or the next of a stream."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from rlhf_jax.batches import Prompts, RankedAnswers
from rlhf_jax.data.order import EpochOrder, PromptStream, RankingStream
from rlhf_jax.data.tokens import take
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
            self._stream = _begun(stream.batches(a_step, seed), loop)

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


class DrawnPrompts:
    """Prompts to train on, so many at a time."""

    def __init__(
        self,
        train: Prompts,
        rows: Sequence[Any],
        draw: Callable[[int, int], Int[np.ndarray, " B"]],
        stream: PromptStream | None,
        count: int,
        seed: int,
        loop: Loop,
    ) -> None:
        """draw(step, round) are the `count` numbers of those in memory; a stream goes before them.

        Raises UserError where the loop's checkpoint has no place in a stream, or one of other data.
        """
        self._train, self._rows, self._draw = train, rows, draw
        self._stream = None if stream is None else _begun(stream(count, seed), loop)

    def asked(self, step: int, number: int = 0) -> tuple[Prompts, Sequence[Any]]:
        """The prompts of a round of a step, and the rows that their `row` numbers; of a stream the next ones."""
        if self._stream is None:
            return take(self._train, self._draw(step, number)), self._rows
        return next(self._stream)

    def data_state(self) -> Any:
        """The position in the stream, for a checkpoint; None in memory, where the prompts follow from the step."""
        return None if self._stream is None else self._stream.get_state()


def _begun(batches: Any, loop: Loop) -> Any:
    """A stream's batches from the place where the loop's checkpoint was."""
    if 0 < loop.first < loop.steps:
        set_place(batches, loop.data_state())
    return batches
