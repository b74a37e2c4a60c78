"""Who is told of a run's metrics beside its folder: TensorBoard, and Weights & Biases where it is asked for."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from rlhf_jax.errors import UserError


class Events:
    """Scalars and hyperparameters for TensorBoard, on the disk every few seconds.

    Not by SummaryWriter, which writes in a thread: a full disk ends that thread, whose queue then waits for ever.
    """

    SECONDS = 5.0

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """`config` is flat: values by the path of their flag."""
        with torch_hidden():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
            from tensorboardX.summary import hparams, text

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        told = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in config.items()}
        table = "\n".join(["| flag | value |", "|---|---|", *(f"| {name} | {v} |" for name, v in told.items())])
        for summary in (text("config", table), *hparams(told, {})):
            self._write(summary, 0)

    def add(self, stage: str, step: int, scalars: Mapping[str, float | int]) -> None:
        """Adds those that are finite, as stage/name."""
        for name, value in scalars.items():
            if math.isfinite(value):
                scalar = self._summary.Value(tag=f"{stage}/{name}", simple_value=float(value))
                self._write(self._summary(value=[scalar]), step)

    def close(self) -> None:
        self._writer.close()

    def _write(self, summary: Any, step: int) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > self.SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()


@contextmanager
def torch_hidden() -> Iterator[None]:
    """Inside, torch is as if not installed, unless it is imported already.

    tensorboardX imports torch where it finds it, which takes a second, and needs it for an annotation alone.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = cast(Any, None)
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


class WandB:
    """The same for Weights & Biases. What fails there is warned of once, and the training goes on without it."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, id: str, warn: Callable[[str], None]) -> None:
        """A run with a known `id` goes on; its files lie in folder/wandb."""
        self._warn = warn
        self._run: Any = None
        with self._harmless():
            import wandb

            settings = wandb.Settings(console="off", silent=True)
            self._run = wandb.init(
                project="rlhf_jax", name=folder.name, id=id, resume="allow", dir=str(folder), config=dict(config),
                settings=settings,
            )  # fmt: skip

    def add(self, stage: str, step: int, scalars: Mapping[str, float | int]) -> None:
        """Adds all, as stage/name over stage/step: each stage has steps of its own."""
        if self._run is not None:
            with self._harmless():
                self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": x for name, x in scalars.items()}})

    def summary(self, scalars: Mapping[str, float | int]) -> None:
        """Adds the final numbers."""
        if self._run is not None:
            with self._harmless():
                self._run.summary.update(dict(scalars))

    def close(self, status: str) -> None:
        """Says how the run ended, and ends it; any status but "finished" is a failure there."""
        if self._run is not None:
            with self._harmless():
                self._run.summary.update({"status": status})
                self._run.finish(exit_code=0 if status == "finished" else 1)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._run = None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._warn(f"Weights & Biases fails, and is not told of this run any more: {lines[0]}")


def check_tracker(track: str | None) -> None:
    """Raises UserError when the package that --track needs is not installed, or nothing of that name is known."""
    if track not in (None, "wandb"):
        raise UserError(f"--track {track} is not known, only --track wandb")
    if track == "wandb":
        found = find_spec("wandb")
        if found is None or found.origin is None:  # a folder of that name, which such runs leave, is no package
            raise UserError("--track wandb needs a package that is not installed: pip install 'rlhf_jax[wandb]'")
