"""The flags that several experiments share, as dataclasses that a Config inherits from; it takes those that it uses.

A Config names its own flags' class last, so that `--help` shows them first.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from jaxtyping import PRNGKeyArray

from rlhf_jax.adapters import FrozenDtype, split_trainable
from rlhf_jax.data.pairs import Pairs
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.groups import Numbers
from rlhf_jax.log import Run
from rlhf_jax.loop import Loop, check_microbatches
from rlhf_jax.models import BFLOAT16, FLOAT32, MIXED, Precision, with_dropout, with_lora
from rlhf_jax.optimizers import adafactor, adamw, constant, cosine_decay, linear_decay, muon
from rlhf_jax.tasks.text import Source
from rlhf_jax.types import Params

PrecisionName = Literal["float32", "mixed", "bfloat16"]
PRECISIONS: dict[PrecisionName, Precision] = {"float32": FLOAT32, "mixed": MIXED, "bfloat16": BFLOAT16}
OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "muon": muon}
SCHEDULES = {"cosine": cosine_decay, "linear": linear_decay, "constant": constant}


@dataclass(frozen=True)
class Flags:
    """The root of all, so that each class may check its own flags and then call `super().__post_init__()`."""

    def __post_init__(self) -> None: ...


@dataclass(frozen=True)
class RunFlags(Flags):
    """The run's folder and its machines."""

    run_dir: str | None = None
    """Where the run is written; by default the next free runs/<experiment>-<n>."""
    seed: int = 0
    resume: bool = False
    """Go on from the last whole checkpoint in run-dir."""
    accept_changes: bool = False
    """With --resume: go on although flags, model or files are not those that the run was started with."""
    track: Literal["wandb"] | None = None
    """Log to Weights & Biases, too."""
    mesh: str | None = None
    """Devices as a mesh, such as fsdp=8,tensor=4: data=N for copies of the model, fsdp=N for parts of its parameters,
    tensor=N for parts of each layer's work; one N may be -1, all that are left. By default one device; where there are
    many processes, data=-1."""
    hosts: str | None = None
    """One of many processes: ADDRESS:PORT of the first, how many, number of this one, as in 10.0.0.1:8476,4,0. By
    default from the environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; SLURM; Open MPI; TPU."""

    def __post_init__(self) -> None:
        at_least(self, seed=0)
        super().__post_init__()


@dataclass(frozen=True)
class ModelFlags(Flags):
    """The model that a stage starts from."""

    model: str | None = None
    """A Hugging Face folder (safetensors) or hub name to start from, with its tokenizer. Without it, and without
    files, everything happens in the controlled world, and what a stage needs is made first."""
    precision: PrecisionName = "float32"
    """mixed: weights float32, arithmetic bfloat16, head float32. bfloat16: all but norms, adapters, logits, losses."""
    max_length: int | None = None
    """Tokens of prompt and answer together. By default as long as the data are, at most 1024 and the model's limit."""


@dataclass(frozen=True)
class SamplingFlags(Flags):
    """How a policy is measured."""

    max_new_tokens: int | None = None
    """The longest answer that is sampled, in tokens. By default 128, and at most a quarter of max-length."""
    eval_batch_size: int | None = None
    """Rows that are sampled or scored at once where nothing is trained. By default 1024 in the controlled world, 16
    with a pretrained model."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "eval_batch_size"):
            if getattr(self, name) is not None:
                at_least(self, **{name: 1})
        super().__post_init__()


@dataclass(frozen=True)
class DataFlags(Flags):
    """How files are read."""

    limit: int | None = None
    """Read at most so many rows of each source."""
    heldout: int = 512
    """At most so many rows, and at most a tenth of them, are held out of each kind of data."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Stop at a row that cannot be used, or skip, count and write it to rejected.jsonl in the run's folder."""

    def __post_init__(self) -> None:
        at_least(self, heldout=1)
        if self.limit is not None:
            at_least(self, limit=2)
        super().__post_init__()

    def sources(self) -> dict[str, Source]:
        """All files that the flags name, by their kind. Raises UserError for flags about files that are not given."""
        return {}


@dataclass(frozen=True)
class DemonstrationFlags(DataFlags):
    """Prompts with answers to imitate."""

    demonstrations: str | tuple[str, ...] | None = None
    """Files, folders or names on the Hub, NAME[:SPLIT]."""
    demonstrations_format: str | None = None
    """messages, sharegpt, prompt_completion, alpaca or text; by default recognised from the columns."""
    demonstrations_columns: tuple[str, ...] = ()
    """Names of the columns in the files, OURS=THEIRS, as in prompt=question completion=answer."""
    demonstrations_weights: tuple[float, ...] = ()
    """How often each source is drawn from; by default as large as it is (streamed: all equally)."""
    streaming: bool = False
    """Read demonstrations as they are needed, for sets larger than memory; they are shuffled in a window."""

    def sources(self) -> dict[str, Source]:
        """All files that the flags name, by their kind. Raises UserError for flags about files that are not given."""
        own = source(
            "demonstrations",
            self.demonstrations,
            self.demonstrations_format,
            self.demonstrations_columns,
            self.demonstrations_weights,
        )
        return own | super().sources()


@dataclass(frozen=True)
class ComparisonFlags(DataFlags):
    """Answers of which people preferred some."""

    comparisons: str | tuple[str, ...] | None = None
    """Files, folders or names on the Hub, NAME[:SPLIT]."""
    comparisons_format: str | None = None
    """preference, instruction_preference, transcripts, ranking or scored; by default recognised."""
    comparisons_columns: tuple[str, ...] = ()
    """Names of the columns in the files, OURS=THEIRS."""
    comparisons_weights: tuple[float, ...] = ()
    """Shares of the sources; as many comparisons are used as these allow without repeating one."""

    def sources(self) -> dict[str, Source]:
        """All files that the flags name, by their kind. Raises UserError for flags about files that are not given."""
        own = source(
            "comparisons",
            self.comparisons,
            self.comparisons_format,
            self.comparisons_columns,
            self.comparisons_weights,
        )
        return own | super().sources()


@dataclass(frozen=True)
class PromptFlags(DataFlags):
    """Prompts to answer."""

    prompts: str | tuple[str, ...] | None = None
    """Files, folders or names on the Hub with a column prompt, question, problem or instruction; by default the
    prompts of the other files."""
    prompts_format: str | None = None
    """prompts, questions, problems or instructions; by default recognised."""
    prompts_columns: tuple[str, ...] = ()
    """Names of the columns in the files, OURS=THEIRS, also those that a checker reads: prompt=Body answer=Answer."""
    prompt_suffix: str = ""
    """A text put behind each prompt, such as "Put the answer behind ####."."""

    def sources(self) -> dict[str, Source]:
        """All files that the flags name, by their kind. Raises UserError for flags about files that are not given."""
        own = source("prompts", self.prompts, self.prompts_format, self.prompts_columns)
        if self.prompt_suffix and not own:
            raise UserError("--prompt-suffix is about the files of --prompts, and there are none")
        return {kind: files._replace(suffix=self.prompt_suffix) for kind, files in own.items()} | super().sources()


@dataclass(frozen=True)
class UnpairedFlags(DataFlags):
    """Answers that people found good or not, each on its own."""

    unpaired: str | tuple[str, ...] | None = None
    """Files, folders or names on the Hub with columns prompt, completion, label; instead of comparisons."""
    unpaired_columns: tuple[str, ...] = ()
    """Names of the columns in the files, OURS=THEIRS."""

    def sources(self) -> dict[str, Source]:
        """All files that the flags name, by their kind. Raises UserError for flags about files that are not given."""
        own = source("unpaired", self.unpaired, columns=self.unpaired_columns)
        return own | super().sources()


@dataclass(frozen=True)
class ReferenceFlags(Flags):
    """The policy that the trained one is held to."""

    reference: str | None = None
    """A folder or name of the same shape and tokenizer as --model; by default what training starts from."""


@dataclass(frozen=True)
class RewardFlags(Flags):
    """The rewards: reward models and Python functions that score answers."""

    reward_model: str | tuple[str, ...] | None = None
    """Folders or hub names of reward models (…ForSequenceClassification with one label), of any size; one with another
    tokenizer reads text."""
    reward: str | tuple[str, ...] | None = None
    """Checkers by name: math (column answer), code (column tests), ifeval, tag, boxed. Or Python functions
    FILE.py:NAME: reward(prompts, completions, **columns) -> list[float | None], as in TRL."""
    reward_weights: tuple[float, ...] = ()
    """Weights of the reward models, then of the functions, in their order; by default 1 each."""
    reward_time_limit: float = 10.0
    """Seconds that a function may take for an answer."""
    reward_max_failed: float = 0.1
    """The share of an iteration's answers on which a function may fail; more end the run."""
    reward_jobs: int = 2
    """Processes that a function runs in."""
    watch: str | tuple[str, ...] | None = None
    """Folders of reward models, or FILE.py:NAME, that only score answers to held-out prompts."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range and a wrong number of weights."""
        at_least(self, reward_time_limit=1e-3, reward_max_failed=0, reward_jobs=1)
        given = len(names(self.reward_model)) + len(names(self.reward))
        if self.reward_weights and len(self.reward_weights) != given:
            raise UserError(f"{len(self.reward_weights)} reward-weights for {given} rewards")
        super().__post_init__()


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
    answer has ended takes the next prompt. On a mesh all are sampled at once."""
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


@dataclass(frozen=True)
class GroupConfig(RunFlags, SamplingFlags, ReferenceFlags, ModelFlags, PromptFlags, RewardFlags):
    """The model, the prompts and the rewards of a stage without a critic."""

    def __post_init__(self) -> None:
        """Raises UserError for prompts without a reward."""
        super().__post_init__()
        if self.prompts and not (self.reward_model or self.reward):
            raise UserError("there is no reward: give --reward math or FILE.py:NAME, or --reward-model FOLDER")


@dataclass(frozen=True)
class BestOfNFlags(Flags):
    """The answers to choose from."""

    n: int = 16
    """Answers to each prompt."""
    no_end_score: float = -3.0
    """The score of an answer that does not end, as in ppo.py."""

    def __post_init__(self) -> None:
        at_least(self, n=2)
        super().__post_init__()


def names(sources: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One source, or several, or none."""
    return (sources,) if isinstance(sources, str) else tuple(sources or ())


def source(
    kind: str,
    given: str | tuple[str, ...] | None,
    file_format: str | None = None,
    columns: tuple[str, ...] = (),
    weights: tuple[float, ...] = (),
) -> dict[str, Source]:
    """{kind: its files}; {} where none are given.

    Raises UserError for flags about files that are not given.
    """
    about = {"format": file_format, "columns": columns, "weights": weights}
    if given:
        return {kind: Source(kind, names(given), file_format, columns, weights)}
    for name, value in about.items():
        if value:
            raise UserError(f"--{kind}-{name} is about the files of --{kind}, and there are none")
    return {}
