"""How a stage trains: weights or adapters, optimiser, schedule, how much of a batch is in memory at once, what is
saved when, and what happens where numbers are not finite.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import optax

from experiments.adapters import Adapters
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.hosts import gather
from rlhf_jax.log import Run
from rlhf_jax.optimizers import adafactor, adamw, constant, cosine_decay, linear_decay, muon
from rlhf_jax.sharding import check_rows, host_share, shard_batch, shard_host_rows, to_host
from rlhf_jax.train import Counts, microbatches

OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "muon": muon}
SCHEDULES = {"cosine": cosine_decay, "linear": linear_decay, "constant": constant}


@dataclass(frozen=True)
class Training(Adapters):
    """What every stage can be told of its optimiser."""

    optimizer: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    """The highest one."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What the learning rate does after warm-up; cosine and linear end at zero."""
    warmup: float = 0.02
    """The share of all steps in which the learning rate rises from zero."""
    weight_decay: float = 0.1
    """Of matrices, times the learning rate; norms and biases do not decay."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this."""
    accumulate: int = 1
    """Parts of a batch whose gradients are computed one after the other; the step is that of the whole batch."""
    save_every: int = 0
    """Steps between checkpoints, beside those at each evaluation."""
    keep: int = 3
    """How many of the last checkpoints stay, beside the best."""
    max_skipped: int = 10
    """Steps in a row that may be skipped, their loss or gradient not being finite, before the run stops; 0: any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, learning_rate=0, warmup=0, weight_decay=0, max_grad_norm=0, accumulate=1)
        at_least(self, save_every=0, keep=1, max_skipped=0)
        if self.warmup > 1:
            raise UserError(f"warmup is {self.warmup}, and a share of all steps is at most 1")


def make_optimizer(cfg: Training, steps: int) -> optax.GradientTransformation:
    """The optimiser for that many steps."""
    schedule = SCHEDULES[cfg.schedule](cfg.learning_rate, steps, warmup=cfg.warmup)
    return OPTIMIZERS[cfg.optimizer](schedule, weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm)


def check_parts(cfg: Training, size: int, what: str) -> None:
    """Raises UserError when a batch of that size does not divide into the microbatches asked for, or these do not
    divide over the mesh."""
    if size % cfg.accumulate:
        raise UserError(f"{size} {what} a step do not divide into {cfg.accumulate} microbatches (accumulate)")
    check_rows(size // cfg.accumulate, f"{what} {'a microbatch' if cfg.accumulate > 1 else 'a step'}")


def save_due(cfg: Training, run: Run, step: int, *, evaluated: bool) -> bool:
    """Whether to save at the end of a step, to be asked once there: also when the run was told to stop."""
    return run.stopping or evaluated or bool(cfg.save_every and step % cfg.save_every == 0)


class SkippedSteps:
    """Stops a run after too many in a row, with their last batch in a file."""

    def __init__(self, cfg: Training, run: Run, stage: str) -> None:
        self._most, self._run, self._stage = cfg.max_skipped, run, stage
        self._in_a_row = 0
        self._last: tuple[int, Any, Any] | None = None

    def watch(self, step: int, skipped: Any, batch: Any) -> None:
        """Looks at the step before, which is done by now: to look at this one would be to wait for it.

        `skipped` counts what was skipped in the step. Raises UserError.
        """
        last, self._last = self._last, (step, skipped, batch)
        if last is None or not self._most:
            return
        self._in_a_row = self._in_a_row + 1 if int(last[1]) else 0
        if self._in_a_row >= self._most:
            path = self._run.dir / f"skipped-{self._stage}-{last[0]}.npz"
            leaves = jax.tree_util.tree_flatten_with_path(to_host(last[2]))[0]
            arrays = {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}
            if self._run.first:
                np.savez(path, allow_pickle=False, **arrays)
            raise UserError(
                f"{self._stage}: loss or gradient not finite at {self._in_a_row} steps in a row, the last of them"
                f" {last[0]}, whose batch is in {path}; a smaller learning rate may help"
            )


def counts_of(cfg: Training, counts: Counts) -> Counts | None:
    """What `make_train_step` needs to accumulate, where that is asked for."""
    return counts if cfg.accumulate > 1 else None


def parts_of(cfg: Training, batch: Any, *, share: bool = False) -> Any:
    """The batch as the stage's step takes it; `share`: this process has only its own of the batch."""
    return in_place(cfg, microbatches(batch, cfg.accumulate) if cfg.accumulate > 1 else batch, share=share)


def in_place(cfg: Training, parts: Any, *, share: bool = False) -> Any:
    """What `parts_of` gives, its rows over the mesh."""
    return (shard_host_rows if share else shard_batch)(parts, axis=int(cfg.accumulate > 1))


def data_state(batches: Any) -> Any:
    """Where the data stand, for a checkpoint: in each share, where processes have shares of their own."""
    number, count = host_share()
    states = dict(gather([number, batches.get_state()]))
    return states[0] if count == 1 else {"shares": [states[one] for one in range(count)]}


def set_data_state(batches: Any, saved: Any) -> None:
    """Goes on from there. Raises UserError when there were more shares, or fewer."""
    number, count = host_share()
    states = saved["shares"] if isinstance(saved, dict) and "shares" in saved else [saved]
    if len(states) != count:
        raise UserError(
            f"the checkpoint is of a run whose processes read the demonstrations in {len(states)} shares, each at its"
            f" place; with these processes and this --mesh it would be {count}"
        )
    batches.set_state(states[number])
