"""The flags of training: what is trained, the optimiser, and the lengths that stages of one kind share."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from jaxtyping import PRNGKeyArray

from experiments.flags import Flags
from rlhf_jax.adapters import FrozenDtype, split_trainable
from rlhf_jax.data.pairs import Pairs
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.groups import Numbers
from rlhf_jax.log import Run
from rlhf_jax.loop import Loop, check_microbatches
from rlhf_jax.models import with_dropout, with_lora
from rlhf_jax.optimizers import adafactor, adamw, constant, cosine_decay, linear_decay, muon
from rlhf_jax.types import Params

OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "muon": muon}
SCHEDULES = {"cosine": cosine_decay, "linear": linear_decay, "constant": constant}


@dataclass(frozen=True)
class Adapters(Flags):
    """The weights that are trained: all of them, or adapters over them."""

    lora_rank: int | None = None
    """Train adapters of this rank over frozen weights; 0 trains the weights. By default 0, and 16 for a pretrained
    model of 50 million parameters and more."""
    lora_alpha: float = 32.0
    """An adapter is added α/r times."""
    lora_targets: str = "(query|key|value|output|gate|up|down)/kernel"
    """A regular expression, looked for in names such as layer_0/query/kernel."""
    lora_rank_stabilized: bool = False
    """α/√r times (rsLoRA)."""
    frozen_dtype: FrozenDtype | None = None
    """The dtype of the frozen weights; by default that of --precision. int8 is for the layers' matrices, with a scale
    (float32) for each output; embeddings and language head keep the dtype of --precision."""

    def __post_init__(self) -> None:
        at_least(self, lora_alpha=0)
        if self.lora_rank is not None:
            at_least(self, lora_rank=0)
        super().__post_init__()

    def split_trainable(self, params: Params, key: PRNGKeyArray) -> tuple[Params, Params]:
        """(frozen, trainable) parameters, as `split_trainable` does it with these flags."""
        return split_trainable(
            params, key, rank=self.lora_rank or 0, alpha=self.lora_alpha, targets=self.lora_targets,
            rank_stabilized=self.lora_rank_stabilized, frozen_dtype=self.frozen_dtype,
        )  # fmt: skip


@dataclass(frozen=True)
class AdapterDropout(Flags):
    """Dropout of adapters, for a stage that trains on given text."""

    lora_dropout: float = 0.0
    """Share of an adapter's inputs that each step leaves out; with accumulate, at the same places of each part."""

    def __post_init__(self) -> None:
        """Raises UserError for a share out of range, and for dropout without adapters."""
        at_least(self, lora_dropout=0)
        rank = getattr(self, "lora_rank", None)
        if self.lora_dropout and not ((rank is None or rank > 0) and self.lora_dropout < 1):
            raise UserError(f"lora-dropout is {self.lora_dropout}; it must be below 1, and needs a lora-rank")
        super().__post_init__()

    def model_in_training(self, frozen: Params, trainable: Params, key: PRNGKeyArray, step: Any) -> Params:
        """The parameters as the loss of one step sees them: adapters with that step's dropout."""
        if self.lora_dropout:
            trainable = with_dropout(trainable, jax.random.fold_in(key, step), rate=self.lora_dropout)
        return with_lora(frozen, trainable)


GRADIENTS = {"adamw": 1, "adafactor": 2, "muon": 3}
"""Trees of the size of a gradient that a step of each optimiser has, for `budget.step_memory`."""


@dataclass(frozen=True)
class Training(Flags):
    """The optimiser, and what is saved when."""

    optimizer: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float | None = None
    """The highest one. By default the controlled world's, or one for the model's size and what of it is trained."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The course of the learning rate after warm-up; cosine and linear end at zero."""
    warmup: float = 0.02
    """The share of all steps in which the learning rate rises from zero."""
    weight_decay: float = 0.1
    """Decay of matrices, times the learning rate; norms and biases do not decay."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this."""
    accumulate: int = 1
    """Parts of a batch whose gradients are computed one after the other; the step is that of the whole batch."""
    save_every: int = 0
    """Steps between checkpoints, beside those at each evaluation."""
    keep: int | None = None
    """How many of the last checkpoints stay, beside the best. By default 3, and 1 for a pretrained model."""
    max_skipped: int = 10
    """Steps in a row that may be skipped, their loss or gradient not being finite, before the run stops; 0: any."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        at_least(self, warmup=0, weight_decay=0, accumulate=1, save_every=0, max_skipped=0)
        if self.learning_rate is not None:
            at_least(self, learning_rate=0)
        if self.keep is not None:
            at_least(self, keep=1)
        if not self.max_grad_norm > 0:
            raise UserError(f"max-grad-norm is {self.max_grad_norm}; it must be more than 0 (inf: never shortened)")
        if self.warmup > 1:
            raise UserError(f"warmup is {self.warmup}, and a share of all steps is at most 1")
        super().__post_init__()

    def make_schedule(self, steps: int) -> optax.Schedule:
        """The learning rate at each of so many steps."""
        assert self.learning_rate is not None
        return SCHEDULES[self.schedule](self.learning_rate, steps, warmup=self.warmup)

    def make_optimizer(self, steps: int) -> optax.GradientTransformation:
        """The optimiser for so many steps."""
        return OPTIMIZERS[self.optimizer](
            self.make_schedule(steps), weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm
        )

    def make_loop(
        self, run: Run, stage: str, steps: int, *, show: tuple[str, ...], log_every: int, updates: int = 1
    ) -> Loop:
        """The stage's loop over so many steps, each of `updates` steps of the optimiser."""
        schedule = self.make_schedule(steps * updates)
        return Loop(
            run, stage, steps=steps, save_every=self.save_every, keep=self.keep or 3, max_skipped=self.max_skipped,
            show=show, learning_rate=lambda step: schedule(step * updates), log_every=log_every, updates=updates,
            gradients=max(min(2, self.accumulate), GRADIENTS[self.optimizer]),
        )  # fmt: skip

    def check_parts(self, rows: int, what: str) -> None:
        """Raises UserError when a batch of so many rows does not divide into microbatches and over the mesh."""
        check_microbatches(rows, self.accumulate, what)


@dataclass(frozen=True)
class PreferenceFlags(Flags):
    """The flags that preference losses share."""

    steps: int | None = None
    """By default 200 in the controlled world, else one epoch."""
    batch_size: int | None = None
    """Pairs a step; of single answers twice as many. By default 64 in the controlled world, else 8."""
    pairs: Pairs = "best_worst"
    """The pairs of a prompt's ranked answers: the best and the worst, or all that differ in rank."""
    evaluations: int = 8
    """So many times held-out comparisons are predicted, and answers to held-out prompts sampled."""

    def __post_init__(self) -> None:
        at_least(self, evaluations=1)
        for name in ("steps", "batch_size"):
            if getattr(self, name) is not None:
                at_least(self, **{name: 1})
        super().__post_init__()


@dataclass(frozen=True)
class Preference(Adapters, Training, PreferenceFlags):
    """The flags of a stage that learns from comparisons without a reward model."""

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size is not None:
            self.check_parts(self.batch_size, "pairs")


@dataclass(frozen=True)
class GroupFlags(Flags):
    """The flags that algorithms without a critic share."""

    steps: int | None = None
    """Iterations of rollout and update. By default 60 in the controlled world, else 100."""
    groups: int = 16
    """Prompts an iteration."""
    group_size: int = 8
    """Answers to each prompt."""
    epochs: int = 1
    """Passes over an iteration's answers."""
    minibatches: int = 1
    """Parts of an iteration's answers, one optimiser step each."""
    temperature: float = 1.0
    """The temperature of sampling and of every log-probability."""
    pass_samples: int | None = None
    """Answers to each held-out prompt at the end, before and after training, for pass@1 to pass@n. By default 8 in the
    controlled world, else none."""
    slots: int | None = None
    """Answers that are sampled at once, whole groups of them. By default all; fewer need less memory, and a slot whose
    answer has ended takes the next prompt. On a mesh each copy of the weights has its share of them and of the groups;
    where these do not divide over the copies, all answers are sampled at once."""
    evaluations: int = 3
    """So many checkpoints are saved, and so many times the scorers of --watch are asked."""

    def __post_init__(self) -> None:
        at_least(self, groups=1, group_size=2, epochs=1, minibatches=1, temperature=1e-3, evaluations=1)
        if self.steps is not None:
            at_least(self, steps=1)
        if self.pass_samples is not None:
            at_least(self, pass_samples=0)
        super().__post_init__()


@dataclass(frozen=True)
class Groups(Adapters, Training, GroupFlags):
    """The flags of a stage that learns from groups of answers, without a critic."""

    schedule: Literal["cosine", "linear", "constant"] = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Raises UserError for answers that do not divide into minibatches."""
        super().__post_init__()
        answers = self.groups * self.group_size
        if answers % self.minibatches:
            raise UserError(f"{answers} answers do not divide into {self.minibatches} minibatches")
        if self.slots is not None and (self.slots < self.group_size or self.slots % self.group_size):
            raise UserError(f"{self.slots} slots are not whole groups of {self.group_size} answers")
        self.check_parts(answers // self.minibatches, "answers")

    def numbers(self, max_new_tokens: int) -> Numbers:
        """The sizes of an iteration."""
        return Numbers(
            self.groups, self.group_size, self.epochs, self.minibatches, self.accumulate, self.temperature,
            max_new_tokens, self.slots or self.groups * self.group_size,
        )  # fmt: skip

    def make_group_loop(self, run: Run, stage: str) -> Loop:
        """The stage's loop over its iterations."""
        assert self.steps is not None
        show = ("score", "pass@1", "utility", "kl_k1", "length")
        return self.make_loop(run, stage, self.steps, show=show, log_every=1, updates=self.epochs * self.minibatches)

    def make_group_optimizer(self) -> optax.GradientTransformation:
        """The optimiser for all updates of all iterations."""
        assert self.steps is not None
        return self.make_optimizer(self.steps * self.epochs * self.minibatches)
