"""The part of a training loop that all algorithms share: its first step, logs, checkpoints, and when it stops.

loop = Loop(run, "sft", steps=steps, save_every=0, keep=3, max_skipped=10, show=("loss",), learning_rate=schedule)
state = loop.restore(state)
for step in loop:
    state, metrics = train_step(state, batch)
    loop.watch_skipped(step, metrics["skipped"], batch)
    loop.end_step(step, state, metrics, evaluated=..., best=...)
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax.training.train_state import TrainState

from rlhf_jax import checkpoint
from rlhf_jax.budget import advice, free_memory, memory_line, sampling_memory, step_memory
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import from_first, gather
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import ModelConfig
from rlhf_jax.sharding import check_rows, host_share, shard_batch, shard_host_rows, to_host
from rlhf_jax.train import microbatches
from rlhf_jax.types import Params

State = TypeVar("State")
SMALL = 2e8
"""Bytes below which nobody has to know."""


class Loop:
    """The steps of one stage of a run, from the last whole checkpoint on."""

    def __init__(
        self,
        run: Run,
        stage: str,
        *,
        steps: int,
        save_every: int,
        keep: int,
        max_skipped: int,
        show: tuple[str, ...],
        learning_rate: Callable[[Any], Any] | None = None,
        log_every: int = 1,
        updates: int = 1,
        gradients: int = 1,
    ) -> None:
        """`save_every` and `log_every` count steps, each with so many `updates` of the parameters.

        The last `keep` checkpoints are kept, and the best one. `gradients` is that of `step_memory`.

        `max_skipped` steps in a row whose loss or gradient is not finite end the run; 0 allows any number.
        """
        self.run, self.stage, self.steps, self.first = run, stage, steps, 0
        self._save_every, self._keep, self._max_skipped = save_every, keep, max_skipped
        self._show, self._learning_rate, self._log_every = show, learning_rate, log_every
        self._skipped_in_a_row, self._updates, self._gradients = 0, updates, gradients
        if learning_rate is not None:
            learning_rate(0)  # its few operations are compiled now, not after the first step
        self._last_step: tuple[int, Any, Any] | None = None

    def restore(self, state: State, *, before: float = math.inf) -> State:
        """The state of the stage's last whole checkpoint before step `before`; the state given, without one."""
        state, self.first = self.run.restore(self.stage, state, before=before)
        return state

    def say_memory(
        self,
        config: ModelConfig,
        trained: Params,
        held: Any,
        shape: tuple[int, int],
        *,
        adapters: bool,
        sampled: tuple[Params, int, str] | None = None,
    ) -> None:
        """Says what the stage's steps will take, before they are compiled, and warns where that is not free.

        `shape` is (rows, tokens) of a microbatch, `held` all arrays that a step is given.
        `sampled` are the weights that sample, how many answers at a time, of as many tokens, and the flag for fewer.
        Small models are left out.
        """
        needed = step_memory(config, trained, held, rows=shape[0], length=shape[1], gradients=self._gradients)
        if sampled is not None:
            needed = needed._replace(sampling=sampling_memory(config, sampled[0], rows=sampled[1], length=shape[1]))
        free = free_memory()
        fits = free is None or needed.more <= free
        if not fits:
            flag = "" if sampled is None else sampled[2]
            flags = ", ".join(advice(config, needed, rows=shape[0], adapters=adapters, sampling=flag))
            self.run.warn(f"{memory_line(self.stage, needed, free)}: {flags} would help")
        elif needed.held + needed.more > SMALL:
            self.run.say(memory_line(self.stage, needed, free))

    def data_state(self) -> Any:
        """The position in the data at the checkpoint that was restored; None at the beginning."""
        if not self.first:
            return None
        return checkpoint.inspect(self.run.dir, self.stage, self.first, files=False).data_state

    def __iter__(self) -> Iterator[int]:
        """Numbers of steps, from 0, under the run's progress bar."""
        yield from self.run.progress(self.stage, range(self.first, self.steps), show=self._show)

    def is_last(self, step: int) -> bool:
        """Whether that step is the stage's last."""
        return step + 1 == self.steps

    def end_step(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, Any],
        *,
        evaluated: bool,
        best: float | None = None,
        data_state: Any = None,
    ) -> None:
        """Logs the step. Saves it at an evaluation, every `save_every` steps, and when the run is told to stop.

        `best` ranks the checkpoint; higher is better. `data_state` is a position in the data, or a function that is
        asked for it when there is something to save. For a TrainState the number of updates skipped so far is logged.
        """
        if step % self._log_every == 0 or evaluated:
            known: dict[str, Any] = {}
            if self._learning_rate is not None:
                known["learning_rate"] = float(self._learning_rate(step))
            if isinstance(state, TrainState):
                known["skipped"] = (step + 1) * self._updates - int(state.step)
            self.run.log(self.stage, step + 1, {**metrics, **known})
        due = self._save_every and (step + 1) % self._save_every == 0
        if self.run.stopping or evaluated or due:
            position = data_state() if callable(data_state) else data_state
            self.run.save(self.stage, step + 1, state, keep=self._keep, metric=best, data_state=position)

    def last_metrics(self) -> dict[str, float]:
        """The last line that the stage logged, as metrics.jsonl has it; NaN for what was not finite.

        A resumed stage that was killed after its last step has nothing left to do: it reports these.
        """
        rows = from_first(lambda: read_metrics(self.run.dir).get(self.stage, [])[-1:])
        row = rows[0] if rows else {}
        names = row.keys() - {"stage", "step", "time"}
        return {name: math.nan if row[name] is None else float(row[name]) for name in row if name in names}

    def watch_skipped(self, step: int, skipped: Any, batch: Any) -> None:
        """Counts steps that were skipped in a row. `skipped` is a number on the device, 0 where the step was taken.

        It reads the number of the step before, which is done by now: reading this one would wait for it.
        Raises UserError after too many in a row, and writes the last one's batch to a file.
        """
        last, self._last_step = self._last_step, (step + 1, skipped, batch)
        if last is None or not self._max_skipped:
            return
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if int(last[1]) else 0
        if self._skipped_in_a_row >= self._max_skipped:
            path = self.run.dir / f"skipped-{self.stage}-{last[0]}.npz"
            leaves = jax.tree_util.tree_flatten_with_path(to_host(last[2]))[0]
            arrays = {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}
            if self.run.first:
                np.savez(path, allow_pickle=False, **arrays)
            raise UserError(
                f"{self.stage}: the loss or gradient was not finite in {self._skipped_in_a_row} steps in a row. The"
                f" last one is step {last[0]}; its batch is in {path}. A smaller learning rate may help."
            )


def microbatch_shape(batch: Any, accumulate: int) -> tuple[int, int]:
    """(rows, tokens) of a microbatch of a training batch, those of its largest array."""
    shape = max((leaf.shape for leaf in jax.tree.leaves(batch)), key=math.prod)
    return math.prod(shape[:-1]) // accumulate, shape[-1]


def check_microbatches(rows: int, accumulate: int, what: str) -> None:
    """Raises UserError when a batch of so many rows does not divide into `accumulate` microbatches, or when these do
    not divide over the mesh that is set."""
    if rows % accumulate:
        raise UserError(f"{rows} {what} a step do not divide into {accumulate} microbatches (accumulate)")
    check_rows(rows // accumulate, f"{what} {'a microbatch' if accumulate > 1 else 'a step'}")


def shard_microbatches(batch: Any, accumulate: int, *, host_rows: bool = False) -> Any:
    """A batch of numpy arrays as a training step takes it: its rows over the mesh, in `accumulate` microbatches.

    `host_rows`: this process has read only its own rows of the batch (`host_share`).
    """
    return shard_stacked(microbatches(batch, accumulate) if accumulate > 1 else batch, accumulate, host_rows=host_rows)


def shard_stacked(batch: Any, accumulate: int, *, host_rows: bool = False) -> Any:
    """`shard_microbatches` for a batch that already has an axis of microbatches, if there are several."""
    return (shard_host_rows if host_rows else shard_batch)(batch, axis=int(accumulate > 1))


def gather_data_state(batches: Any) -> Any:
    """The position in the data, for a checkpoint. Where processes read shares of their own: each share's."""
    number, count = host_share()
    states = dict(gather([number, batches.get_state()]))
    return states[0] if count == 1 else {"shares": [states[one] for one in range(count)]}


def set_data_state(batches: Any, saved: Any) -> None:
    """Moves batches to the position that `gather_data_state` saw; None leaves them at the beginning.

    Raises UserError when the number of shares has changed, and for a position in data of another kind.
    """
    if saved is None:
        return
    number, count = host_share()
    states = saved["shares"] if isinstance(saved, dict) and "shares" in saved else [saved]
    if len(states) != count:
        raise UserError(
            f"the run that wrote the checkpoint read the demonstrations in {len(states)} shares; these processes and"
            f" this --mesh read them in {count}: resume with as many processes, and the same --mesh"
        )
    set_place(batches, states[number])


def set_place(batches: Any, state: Any) -> None:
    """Moves batches to a position. Raises UserError for one in data of another kind, and for none."""
    try:
        if state is None:
            raise TypeError
        batches.set_state(state)
    except (TypeError, KeyError, IndexError, AttributeError):
        raise UserError(
            "the checkpoint's position in the data is none in these data: another version of rlhf_jax, or other data,"
            " wrote it; begin a new run"
        ) from None
