"""A run's folder (config, metrics, TensorBoard events, status), its progress on screen.

with Run(cfg.run_dir, cfg, name="sft", resume=cfg.resume) as run:
    for step in run.progress("sft", range(cfg.steps), show=("loss",)):
        ...
        run.log("sft", step + 1, metrics)
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from rlhf_jax import checkpoint
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import first, from_first
from rlhf_jax.metrics import Events, MetricsFile
from rlhf_jax.signals import Preempted, Signals

Item = TypeVar("Item")
Tree = TypeVar("Tree")

PLAIN_LINES = 10
"""Lines that a stage prints where there is no terminal to draw a bar on."""


class Run:
    """A folder that one run writes: config.json, metrics.jsonl, tensorboard/, checkpoints/, summary.json, status.json.

    `run_dir` None takes the next free runs/<name>-<n>. A folder that already holds something is refused with
    a UserError unless `resume`, which goes on appending to it. Metrics are flushed line by line, so a run
    that was killed can be read up to its last step. Of many processes the first writes and prints; all call alike.
    """

    def __init__(self, run_dir: str | Path | None, cfg: Any, *, name: str = "run", resume: bool = False):
        self.dir = Path(from_first(lambda: str(_open_folder(run_dir, name, resume))))
        self.resumed = resume
        self.first = first()
        self._console = Console(stderr=False, highlight=False, soft_wrap=True, quiet=not self.first)
        self._bar: Progress | None = None
        self._shown: dict[tuple[str, str], float] = {}
        self._signals = Signals()
        self._writer = checkpoint.Writer(self.dir)
        self._saved: tuple[str, int] | None = None
        self._metrics = MetricsFile(self.dir / "metrics.jsonl" if self.first else Path(os.devnull))
        self._events = Events(self.dir / "tensorboard") if self.first else None
        config = json.loads(json.dumps(dataclasses.asdict(cfg), default=str))
        if resume:
            self._compare(config)
        self._write("config.json", config)
        self._write("status.json", {"status": "running"})

    def __enter__(self) -> "Run":
        self._signals.open()
        self.say(f"run: {self.dir}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ends: dict[Any, str] = {None: "finished", KeyboardInterrupt: "interrupted", Preempted: "preempted"}
        status = ends.get(kind, "failed")
        self._signals.closing()
        if self._bar is not None:
            self._bar.stop()
        failures: list[Exception] = []
        events = [] if self._events is None else [self._events.close]
        for close in (self._writer.close, self._metrics.close, *events):
            try:
                close()
            except Exception as failure:  # a full disk, or what the writing of the last checkpoint met
                failures.append(failure)
        hidden = kind not in (None, Preempted)
        if failures:
            status = "failed"
        try:
            self._write("status.json", {"status": status})
        except OSError as failure:
            failures.append(failure)
        if failures and hidden:
            self.warn(str(failures[0]))
        elif status == "preempted":
            saved = f"saved at step {self._saved[1]} of {self._saved[0]}" if self._saved else "nothing new to save"
            self.say(f"preempted: {saved}, go on with --run-dir {self.dir} --resume")
        else:
            self.say(f"{status}: the run is in {self.dir}")
        self._signals.close()
        if failures and not hidden:
            raise failures[0]

    @property
    def stopping(self) -> bool:
        """Whether the run was told (SIGTERM) to end: asked once at each step's end, by a stage that saves then."""
        return self._signals.stopping

    def save(
        self,
        stage: str,
        step: int,
        state: Any,
        *,
        keep: int | None = None,
        metric: float | int | None = None,
        data_state: Any = None,
    ) -> None:
        """Writes a checkpoint as `checkpoint.save` does, while the run goes on; after the step's `log`."""
        self._writer.wait()
        with self._signals.undisturbed():
            self._writer.save(stage, step, state, keep=keep, metric=metric, data_state=data_state)
            self._saved = stage, step

    def restore(self, stage: str, state: Tree, *, before: int | float = math.inf) -> tuple[Tree, int]:
        """Where a stage begins: the state and step of its last whole checkpoint; (state, 0) without one.

        The arrays of `state` are given up for those restored, as by donation. Damaged checkpoints are named and set
        aside, those at or after step `before` passed over, and what the stage logged after that step is forgotten.
        """
        step = None
        if self.resumed:
            self._writer.wait()
            for line in from_first(lambda: checkpoint.set_aside_damaged(self.dir, stage)):
                self.warn(line)
            step = from_first(lambda: checkpoint.latest(self.dir, stage, before=before))
            self._metrics.rewind(stage, step or 0)
        if step is None:
            return state, 0
        like = jax.tree.map(_given_up, state)
        return checkpoint.restore(self.dir, stage, step, like=like), step

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes scalars (Python, numpy or jax) of one step; NaN and infinities become null in the JSON.

        What is there from before the run was resumed, and was not taken out by `restore`, is not written again.
        """
        scalars = {name: _scalar(name, value) for name, value in metrics.items()}
        line = {"stage": stage, "step": int(step), "time": round(time.time(), 3), **_finite(scalars)}
        self._shown |= {(stage, name): value for name, value in scalars.items()}
        with self._signals.undisturbed():
            if not self._metrics.add(line):
                return
            for name, value in scalars.items():
                if self._events is not None and math.isfinite(value):
                    self._events.add_scalar(f"{stage}/{name}", float(value), step)

    def summary(self, metrics: Mapping[str, Any]) -> None:
        """Writes summary.json, the final numbers."""
        self._write("summary.json", _finite({name: _scalar(name, value) for name, value in metrics.items()}))

    def say(self, text: str) -> None:
        """One line for the user, above the progress bar if there is one."""
        with self._signals.undisturbed():
            self._console.print(text, markup=False)

    def show(self, draw: Callable[[bool], Text]) -> None:
        """What draw(colour) gives; colour is False where none is wanted (NO_COLOR) or there is no terminal."""
        text = draw(self._console.is_terminal and not self._console.no_color)
        encoding = self._console.encoding
        text.plain = text.plain.encode(encoding, "replace").decode(encoding)
        with self._signals.undisturbed():
            self._console.print(text)

    def warn(self, text: str) -> None:
        """One line that the user should not miss."""
        with self._signals.undisturbed():
            self._console.print(f"warning: {text}", style="yellow", markup=False)

    def progress(
        self, stage: str, items: Iterable[Item], *, show: Sequence[str] = (), total: int | None = None
    ) -> Iterator[Item]:
        """Goes through `items` under a bar that shows the last logged value of each metric in `show`."""
        total = len(items) if total is None else total  # type: ignore[arg-type]
        draw = self._drawn if self._console.is_terminal else self._printed
        return self._signals.loop(draw(stage, items, show, total))

    def _drawn(self, stage: str, items: Iterable[Item], show: Sequence[str], total: int) -> Iterator[Item]:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(
            *columns, TextColumn("{task.fields[numbers]}"), console=self._console, refresh_per_second=4
        )
        task = self._bar.add_task(stage, total=total, numbers="")
        with self._signals.undisturbed():
            self._bar.start()
        try:
            for item in items:
                yield item
                with self._signals.undisturbed():
                    self._bar.update(task, advance=1, numbers=self._numbers(stage, show))
        finally:
            self._bar.stop()

    def _printed(self, stage: str, items: Iterable[Item], show: Sequence[str], total: int) -> Iterator[Item]:
        began = time.perf_counter()
        for done, item in enumerate(items, 1):
            yield item
            if done == total or done * PLAIN_LINES // total > (done - 1) * PLAIN_LINES // total:
                seconds = time.perf_counter() - began
                self.say(f"{stage:<12} {done}/{total} {seconds:6.1f} s  {self._numbers(stage, show)}")

    def _numbers(self, stage: str, show: Sequence[str]) -> str:
        return "  ".join(f"{n} {self._shown[stage, n]:.4g}" for n in show if (stage, n) in self._shown)

    def _write(self, name: str, value: Any) -> None:
        if self.first:
            _write_json(self.dir / name, value)

    def _compare(self, config: dict[str, Any]) -> None:
        before = read_json(self.dir / "config.json")
        if not before:
            self.warn(f"{self.dir / 'config.json'} cannot be read; going on with the flags given now")
        old, new = _flat(before), _flat(config)
        for name in sorted(old.keys() - {"resume", "run_dir", "hosts"}):
            if old[name] != new.get(name):
                self.warn(f"resumed with {name} = {new.get(name)}, it was {old[name]}")


@contextmanager
def count_compilations() -> Iterator[Callable[[], int]]:
    """Yields a function: how many programs JAX has compiled (or read from its cache) so far."""
    count = 0

    def listener(event: str, duration_secs: float, **kwargs: str | int) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield lambda: count
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _open_folder(run_dir: str | Path | None, name: str, resume: bool) -> Path:
    if run_dir is None:
        if resume:
            raise UserError("--resume needs --run-dir: which run is to go on?")
        return _fresh_folder(name)
    folder = Path(run_dir)
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if used and not folder.is_dir():
        raise UserError(f"{folder} is a file; --run-dir wants a folder")
    if used and not resume:
        raise UserError(f"{folder} already holds something: take another --run-dir, or --resume that run")
    if resume and not (folder / "config.json").exists():
        raise UserError(f"there is no run to resume in {folder} (it has no config.json)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run's folder {folder} cannot be made: {error.strerror}") from None
    return folder


def _fresh_folder(name: str) -> Path:
    number = 1
    while True:
        folder = Path("runs") / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # also when another run took it this very moment
            number += 1


def _given_up(leaf: Any) -> Any:
    """What is to be restored in place of an array, which is freed."""
    if not isinstance(leaf, jax.Array):
        return leaf
    like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    leaf.delete()
    return like


def _scalar(name: str, value: Any) -> float | int:
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name!r} has shape {array.shape}; only scalars are logged")
    return array.item()


def _finite(scalars: Mapping[str, float | int]) -> dict[str, float | int | None]:
    return {name: value if math.isfinite(value) else None for name, value in scalars.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all, so that a kill leaves the older file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
