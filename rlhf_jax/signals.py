"""How a run ends when it is told to: Ctrl-C (SIGINT) at once, SIGTERM when the step under way is saved."""

import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

Item = TypeVar("Item")

ONE_PRESS = 1.0
"""Seconds within which interrupts count as one: a launcher passes on the Ctrl-C that came here by itself."""
PREEMPTED = 143
"""The exit code that a shell expects of a program that SIGTERM ended: 128 + SIGTERM."""


class Preempted(SystemExit):
    """SIGTERM came, and what there was to save is saved."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class Signals:
    """The signals of one run.

    Nothing is raised while something is `undisturbed`, nor by SIGTERM in a `loop` over steps.

    The body of such a loop asks at the end of each step whether it is `stopping`, and saves if so; the loop then ends
    with Preempted. Where many processes train together, JAX's service watches SIGTERM and all stop at the same step.
    """

    def __init__(self) -> None:
        self._interrupted = -math.inf
        self._terminated = False
        self._looping = self._asked = self._told = False
        self._busy = self._steps = 0
        self._handlers: dict[int, Any] = {}

    def open(self) -> None:
        """Watches from now on; does nothing outside of the main thread, where Python has no signals."""
        if threading.current_thread() is threading.main_thread():
            self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if not jax.distributed.is_initialized():
                self._handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)

    def closing(self) -> None:
        """From now on nothing is raised: no signal cuts the closing short."""
        self._busy += 1

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def stopping(self) -> bool:
        """Whether the step under way is the last: to be asked once, at its end, by a loop that saves then."""
        if jax.distributed.is_initialized():
            self._terminated = multihost_utils.reached_preemption_sync_point(self._steps)
        self._asked, self._told = True, self._terminated
        return self._told

    def loop(self, items: Iterable[Item]) -> Iterator[Item]:
        """Goes through the items, a step each. Raises Preempted at the end of a step when SIGTERM came."""
        self._looping = True
        try:
            for item in items:
                self._obey()
                self._steps += 1
                self._asked = self._told = False
                yield item
                # A signal that came after the body had asked waits for it to ask again: this step is not saved.
                if self._terminated and (self._told or not self._asked):
                    raise Preempted
        finally:
            self._looping = False
        self._obey()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A signal waits for the end: inside a queue's `put` it would leave a lock that `close` waits for."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
        if not self._busy:
            self._obey()

    def _interrupt(self, *_: Any) -> None:
        """Python drops what is raised inside a garbage collector's callback, and jax has one: hence the note."""
        repeated = time.monotonic() - self._interrupted < ONE_PRESS
        self._interrupted = time.monotonic()
        if not (repeated or self._busy):
            raise KeyboardInterrupt

    def _terminate(self, *_: Any) -> None:
        repeated, self._terminated = self._terminated, True
        if not (repeated or self._busy or self._looping):
            raise Preempted

    def _obey(self) -> None:
        if self._interrupted > -math.inf:
            raise KeyboardInterrupt
        if self._terminated and not self._looping:
            raise Preempted
