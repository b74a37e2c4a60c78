"""The lines that a run shows, and a stage's progress: a bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from rlhf_jax.signals import Signals

Item = TypeVar("Item")

PLAIN_LINES = 10
"""Lines that a stage prints where there is no terminal to draw a bar on."""


class Screen:
    """Standard output. No signal interrupts a write. Quiet in all processes but the first."""

    def __init__(self, signals: Signals, *, quiet: bool) -> None:
        self._console = Console(stderr=False, highlight=False, soft_wrap=True, quiet=quiet)
        self._signals = signals
        self._bar: Progress | None = None
        self._values: dict[tuple[str, str], float] = {}
        self._begun: dict[str, int] = {}

    def say(self, text: str) -> None:
        """One line, above the progress bar if there is one."""
        with self._signals.undisturbed():
            self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """One line that the user should not miss."""
        with self._signals.undisturbed():
            self._console.print(f"warning: {text}", style="yellow", markup=False)

    def show(self, draw: Callable[[bool], Text]) -> None:
        """Prints draw(colour); colour is False where none is wanted (NO_COLOR) or there is no terminal."""
        text = draw(self._console.is_terminal and not self._console.no_color)
        encoding = self._console.encoding
        text.plain = text.plain.encode(encoding, "replace").decode(encoding)
        with self._signals.undisturbed():
            self._console.print(text)

    def measured(self, stage: str, values: Mapping[str, float | int]) -> None:
        """Notes what progress shows next."""
        self._values |= {(stage, name): value for name, value in values.items()}

    def begins_at(self, stage: str, step: int) -> None:
        """Notes how many steps of a stage are done when its progress starts."""
        self._begun[stage] = step

    def progress(self, stage: str, items: Iterable[Item], show: Sequence[str], total: int) -> Iterator[Item]:
        """Goes through `items`, of which there are `total`, beside what was done of the stage before."""
        begun = self._begun.pop(stage, 0)
        if begun:
            whole = begun + total
            self.say(
                f"{stage}: goes on from step {begun} of {whole}" if total else f"{stage}: all {whole} steps are done"
            )
        draw = self._drawn if self._console.is_terminal else self._printed
        yield from draw(stage, items, show, begun, total)

    def stop(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _drawn(self, stage: str, items: Iterable[Item], show: Sequence[str], begun: int, total: int) -> Iterator[Item]:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(
            *columns, TextColumn("{task.fields[numbers]}"), console=self._console, refresh_per_second=4
        )
        task = self._bar.add_task(stage, total=begun + total, completed=begun, numbers="")
        with self._signals.undisturbed():
            self._bar.start()
        try:
            for item in items:
                yield item
                with self._signals.undisturbed():
                    self._bar.update(task, advance=1, numbers=self._numbers(stage, show))
        finally:
            self._bar.stop()

    def _printed(
        self, stage: str, items: Iterable[Item], show: Sequence[str], begun: int, total: int
    ) -> Iterator[Item]:
        start = time.perf_counter()
        for done, item in enumerate(items, 1):
            yield item
            if done == total or done * PLAIN_LINES // total > (done - 1) * PLAIN_LINES // total:
                seconds = time.perf_counter() - start
                line = f"{stage:<12} {begun + done}/{begun + total} {seconds:6.1f} s  {self._numbers(stage, show)}"
                self.say(line.rstrip())
                # The next line shows what is measured from here on: a number is not shown twice.
                self._values = {key: value for key, value in self._values.items() if key[0] != stage}

    def _numbers(self, stage: str, show: Sequence[str]) -> str:
        return "  ".join(f"{n} {self._values[stage, n]:.4g}" for n in show if (stage, n) in self._values)
