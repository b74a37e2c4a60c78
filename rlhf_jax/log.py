"""A run's folder (config, where it came from, metrics, status), and what the user is told meanwhile.

with Run(cfg.run_dir, cfg, name="sft", resume=cfg.resume) as run:
    run.inputs(model=cfg.model, demonstrations=cfg.demonstrations)
    for step in run.progress("sft", range(cfg.steps), show=("loss",)):
        ...
        run.log("sft", step + 1, metrics)
"""

import dataclasses
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from rich.text import Text

import rlhf_jax
from rlhf_jax import checkpoint, clock, provenance
from rlhf_jax.compiled import long_compilations_said
from rlhf_jax.errors import UserError
from rlhf_jax.folder import changed_flags, flat, open_folder, read_json, remove_folder, write_json
from rlhf_jax.hosts import first, from_first
from rlhf_jax.metrics import MetricsFile
from rlhf_jax.screen import Screen
from rlhf_jax.signals import Preempted, Signals
from rlhf_jax.trackers import Events, WandB, check_tracker

Item = TypeVar("Item")
Tree = TypeVar("Tree")
RESERVED = {"experiment", "sessions", "inputs", "wandb"}
"""Keys of run.json that `Run.record` may not be given."""


class Run:
    """A folder that one run writes: config.json, run.json, metrics.jsonl, tensorboard/, checkpoints/, summary.json,
    status.json.

    `run_dir` None takes the next free runs/<name>-<n>. A folder that already holds something is refused with
    a UserError unless `resume`, which goes on appending to it. What is resumed has to be a run of the same experiment,
    `name`, and its flags the same, but for those that change nothing of what is learned (`folder.UNLEARNED`); where
    the config's field accept_changes is true, other flags are only warned of. A field track, "wandb", has Weights &
    Biases told too. Metrics are flushed line by line, so a run that was killed can be read up to its last step. Of
    many processes the first writes and prints; all call alike.

    A run that a UserError ends before anything was logged or saved takes its folder away again if it has made it.
    """

    def __init__(self, run_dir: str | Path | None, cfg: Any, *, name: str, resume: bool = False):
        flags = json.loads(json.dumps(dataclasses.asdict(cfg), default=str))
        self._accepts = bool(flags.get("accept_changes"))
        from_first(lambda: check_tracker(flags.get("track")))
        folder, self._made = from_first(lambda: open_folder(run_dir, name, resume))
        self.dir = Path(folder)
        changes = from_first(lambda: changed_flags(self.dir, name, flags)) if resume else []
        self.resumed = resume
        self.first = first()
        self._signals = Signals()
        self._compiling = long_compilations_said(self.say)
        self._screen = Screen(self._signals, quiet=not self.first)
        self._refuse(changes)
        self._writer = checkpoint.Writer(self.dir)
        self._saved: tuple[str, int] | None = None
        self._touched = False
        self._before = read_json(self.dir / "status.json").get("status", "failed")
        self._metrics = MetricsFile(self.dir / "metrics.jsonl" if self.first else Path(os.devnull))
        self._facts = self._begin(name)
        # Chat templates may write the date: a run that goes on is told that of its first day.
        self._date = from_first(
            lambda: (read_json(self.dir / "config.json") if resume else {}).get("date") or clock.now_text()
        )
        config = {"experiment": name, "version": rlhf_jax.__version__, "date": self._date, **flags}
        self._events = Events(self.dir / "tensorboard", flat(config)) if self.first else None
        self._wandb: WandB | None = None
        if self.first and flags.get("track") == "wandb":
            self._facts.setdefault("wandb", secrets.token_hex(4))
            self._wandb = WandB(self.dir, config, id=self._facts["wandb"], warn=self.warn)
        self._write("config.json", config)
        self._write("run.json", self._facts)
        self._write("status.json", {"status": "running"})

    def __enter__(self) -> "Run":
        self._signals.open()
        clock.keep(self._date)
        self.say(f"run: {self.dir}")
        self._compiling.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ends: dict[Any, str] = {None: "finished", KeyboardInterrupt: "interrupted", Preempted: "preempted"}
        status = ends.get(kind, "failed")
        self._signals.closing()
        clock.release()
        self._screen.stop()
        failures: list[Exception] = []
        closing: list[Callable[[], Any]] = [self._writer.close, self._metrics.close]
        closing += [] if self._events is None else [self._events.close]
        closing.append(partial(self._compiling.__exit__, None, None, None))
        for close in closing:
            try:
                close()
            except Exception as failure:  # a full disk, or what the writing of the last checkpoint met
                failures.append(failure)
        hidden = kind not in (None, Preempted)
        if failures:
            status = "failed"
        if self._wandb is not None:
            self._wandb.close(status)
        refused = self.resumed and not self._touched and isinstance(error, UserError) and self._before != "running"
        try:
            self._facts["sessions"][-1] = provenance.end_session(self._facts["sessions"][-1], status)
            self._write("run.json", self._facts)
            self._write("status.json", {"status": self._before if refused else status})
        except OSError as failure:
            failures.append(failure)
        if failures and hidden:
            self.warn(str(failures[0]))
        elif status == "preempted":
            saved = f"saved at step {self._saved[1]} of {self._saved[0]}" if self._saved else "nothing new to save"
            self.say(f"preempted: {saved}, go on with --run-dir {self.dir} --resume")
        elif isinstance(error, UserError) and self.empty:
            if self.first:
                remove_folder(self.dir, made=self._made)
            self.say(f"failed before anything was logged or saved: nothing is left in {self.dir}")
        elif refused:
            self.say(f"nothing was done, the run stays {self._before}: {self.dir}")
        else:
            self.say(f"{status}: the run is in {self.dir}")
        self._signals.close()
        if failures and not hidden:
            raise failures[0]

    @property
    def stopping(self) -> bool:
        """Whether the run was told (SIGTERM) to end: asked once at each step's end, by a stage that saves then."""
        return self._signals.stopping

    @property
    def empty(self) -> bool:
        """Whether this session began the run, and has logged and saved nothing so far."""
        return not (self.resumed or self._touched)

    def keep_folder(self) -> None:
        """The folder stays although nothing is logged so far: it holds the run of another stage, too."""
        self._touched = True

    def inputs(self, **given: provenance.Source | Sequence[provenance.Source] | None) -> None:
        """Writes to run.json what the run learns from: names on the hub, and fingerprints of files and folders.

        Raises UserError for what cannot be read, and for what is not as the run was begun with, unless the config's
        accept_changes is true: then it is a warning.
        """
        found, changes = from_first(lambda: self._compared(given))
        self._refuse(changes)
        self._facts["inputs"] = {**self._facts.get("inputs", {}), **found}
        self._write("run.json", self._facts)

    def record(self, **facts: Any) -> None:
        """Writes JSON values to run.json, such as counts of data; objects are merged with what is there.

        Raises ValueError for a name that run.json has for itself.
        """
        if taken := sorted(facts.keys() & RESERVED):
            raise ValueError(f"run.json has {taken[0]} for itself: record it by another name")
        self._facts = _merged(self._facts, facts)
        self._write("run.json", self._facts)

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
            self._touched = True
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
        self._screen.begins_at(stage, step or 0)
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
        self._screen.measured(stage, scalars)
        with self._signals.undisturbed():
            self._touched = True
            if not self._metrics.add(line):
                return
            for told in (self._events, self._wandb):
                if told is not None:
                    told.add(stage, int(step), scalars)

    def summary(self, metrics: Mapping[str, Any]) -> None:
        """Writes summary.json, the final numbers."""
        scalars = {name: _scalar(name, value) for name, value in metrics.items()}
        self._touched = True
        self._write("summary.json", _finite(scalars))
        if self._wandb is not None:
            with self._signals.undisturbed():
                self._wandb.summary(scalars)

    def say(self, text: str) -> None:
        """One line for the user, above the progress bar if there is one."""
        self._screen.say(text)

    def show(self, draw: Callable[[bool], Text]) -> None:
        """Prints draw(colour); colour is False where none is wanted (NO_COLOR) or there is no terminal."""
        self._screen.show(draw)

    def warn(self, text: str) -> None:
        """One line that the user should not miss."""
        self._screen.warn(text)

    def progress(
        self, stage: str, items: Iterable[Item], *, show: Sequence[str] = (), total: int | None = None
    ) -> Iterator[Item]:
        """Goes through `items` under a bar that shows the last logged value of each metric in `show`.

        Off a terminal, a few lines show what was logged since the line before. A stage that `restore` found at a later
        step than 0 says so first; `items` are then the steps that are left, and `total` counts them.
        """
        total = len(items) if total is None else total  # type: ignore[arg-type]
        return self._signals.loop(self._screen.progress(stage, items, show, total))

    def _begin(self, name: str) -> dict[str, Any]:
        """The content of run.json, with this session added."""
        facts = {"experiment": name, "sessions": [], **read_json(self.dir / "run.json")}
        before = facts["sessions"][-1] if facts["sessions"] else None
        if before and before["end"] is None:
            facts["sessions"][-1] = {**before, "status": "killed"}
        session = provenance.begin_session()
        if before and before["packages"] != session["packages"]:
            old, new = before["packages"], session["packages"]
            others = [f"{p} {new[p]} (was {old.get(p)})" for p in new if new[p] != old.get(p)]
            self.warn(f"goes on with other versions: {', '.join(others)}")
        facts["sessions"].append(session)
        return facts

    def _compared(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        found = provenance.inputs(given)
        return found, provenance.changed_inputs(self._facts.get("inputs", {}), found)

    def _refuse(self, changes: Sequence[str]) -> None:
        """Raises UserError for what the run does not go on with, or warns if it is told to accept it."""
        for change in changes if self._accepts else ():
            self.warn(f"resumed although {change}")
        if changes and not self._accepts:
            raise UserError(
                f"{self.dir} is not resumed: {'; '.join(changes)}; give it what it had, or say --accept-changes"
            )

    def _write(self, name: str, value: Any) -> None:
        if self.first:
            write_json(self.dir / name, value)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {name: _merged(old[name], new[name]) for name in old.keys() & new.keys()
            if isinstance(old[name], Mapping) and isinstance(new[name], Mapping)}  # fmt: skip
    return {**old, **new, **both}


def _given_up(leaf: Any) -> Any:
    """Frees an array; returns its shape and place, for the array that is restored."""
    if not isinstance(leaf, jax.Array):
        return leaf
    like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=checkpoint.bound_to(leaf))
    leaf.delete()
    return like


def _scalar(name: str, value: Any) -> float | int:
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name!r} has shape {array.shape}; only scalars are logged")
    return array.item()


def _finite(scalars: Mapping[str, float | int]) -> dict[str, float | int | None]:
    return {name: value if math.isfinite(value) else None for name, value in scalars.items()}
