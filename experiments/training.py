"""How a stage trains: weights or adapters, optimiser, schedule, and how much of a batch is in memory at once."""

from dataclasses import dataclass
from typing import Any, Literal

import optax

from experiments.adapters import Adapters
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.optimizers import adafactor, adamw, constant, cosine_decay, linear_decay, muon
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

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, learning_rate=0, warmup=0, weight_decay=0, max_grad_norm=0, accumulate=1)
        if self.warmup > 1:
            raise UserError(f"warmup is {self.warmup}, and a share of all steps is at most 1")


def make_optimizer(cfg: Training, steps: int) -> optax.GradientTransformation:
    """The optimiser for that many steps."""
    schedule = SCHEDULES[cfg.schedule](cfg.learning_rate, steps, warmup=cfg.warmup)
    return OPTIMIZERS[cfg.optimizer](schedule, weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm)


def check_parts(cfg: Training, size: int, what: str) -> None:
    """Raises UserError when a batch of that size does not divide into the microbatches asked for."""
    if size % cfg.accumulate:
        raise UserError(f"{size} {what} a step do not divide into {cfg.accumulate} microbatches (accumulate)")


def counts_of(cfg: Training, counts: Counts) -> Counts | None:
    """What `make_train_step` needs to accumulate, where that is asked for."""
    return counts if cfg.accumulate > 1 else None


def parts_of(cfg: Training, batch: Any) -> Any:
    """The batch as the stage's step takes it."""
    return microbatches(batch, cfg.accumulate) if cfg.accumulate > 1 else batch
