"""The flags that several experiments share, as dataclasses that a Config inherits from; it takes those that it uses.

A Config names its own flags' class last, so that `--help` shows them first.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from jaxtyping import PRNGKeyArray

from experiments.panels import preference_report
from rlhf_jax.adapters import FrozenDtype, split_trainable
from rlhf_jax.cli import run_with_report
from rlhf_jax.data.pairs import Examples, Pairs, paired, singly
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.export import export_policy
from rlhf_jax.hosts import from_first
from rlhf_jax.log import Run
from rlhf_jax.loop import Loop, check_microbatches
from rlhf_jax.models import BFLOAT16, FLOAT32, MIXED, Precision, with_dropout, with_lora
from rlhf_jax.optimizers import adafactor, adamw, constant, cosine_decay, linear_decay, muon
from rlhf_jax.preference import ImplicitReward, PreferenceLoss, Trained, train_preferences
from rlhf_jax.pretrained import Pretrained, load_policy
from rlhf_jax.rewards.python import Limits
from rlhf_jax.sampling.sampler import make_sampler
from rlhf_jax.tasks.measure import PolicySampler, compare_policies, make_policy_measure, make_token_scorer
from rlhf_jax.tasks.rewards import Rewards, load_reference, load_rewards
from rlhf_jax.tasks.simulated import World
from rlhf_jax.tasks.task import Comparisons, Task
from rlhf_jax.tasks.text import Source, TextTask
from rlhf_jax.train import keep_freed_memory
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


@dataclass(frozen=True)
class PromptFlags(DataFlags):
    """Prompts to answer."""

    prompts: str | tuple[str, ...] | None = None
    """Files, folders or names on the Hub with a column prompt; by default the prompts of the other files."""
    prompts_format: str | None = None
    """prompts; by default recognised."""
    prompts_columns: tuple[str, ...] = ()
    """Names of the columns in the files, OURS=THEIRS."""


@dataclass(frozen=True)
class UnpairedFlags(DataFlags):
    """Answers that people found good or not, each on its own."""

    unpaired: str | tuple[str, ...] | None = None
    """Files, folders or names on the Hub with columns prompt, completion, label; instead of comparisons."""
    unpaired_columns: tuple[str, ...] = ()
    """Names of the columns in the files, OURS=THEIRS."""


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
    """Python functions FILE.py:NAME: reward(prompts, completions, **columns) -> list[float | None], as in TRL."""
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
            show=show, learning_rate=lambda step: schedule(step * updates), log_every=log_every,
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


def or_default(cfg: Any, **numbers: Any) -> Any:
    """The flags, with a number wherever they say None."""
    return replace(cfg, **{name: number for name, number in numbers.items() if getattr(cfg, name) is None})


def names(sources: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One source, or several, or none."""
    return (sources,) if isinstance(sources, str) else tuple(sources or ())


def pretrained_defaults(cfg: Any, base: Pretrained, *, slower: float = 1.0) -> dict[str, Any]:
    """Numbers for a pretrained model where the flags say None: adapters or weights, learning rate, checkpoints.

    The learning rate is 2e-5 for 8 billion weights and falls with the root of their number; adapters take ten times
    that. Both are at most 1e-3. `slower` divides it.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(base.params))
    rank = cfg.lora_rank if cfg.lora_rank is not None else (16 if size >= 50_000_000 else 0)
    rate = min(1e-3, 2e-5 * (8e9 / size) ** 0.5 * (10 if rank else 1)) / slower
    return {"lora_rank": rank, "learning_rate": float(f"{rate:.1e}"), "keep": 1}


def say_defaults(run: Run, stage: str, given: Any, filled: Any, base: Pretrained) -> None:
    """Prints the numbers that were chosen for a pretrained model, and why."""
    if base.name is None:
        return
    size = sum(leaf.size for leaf in jax.tree.leaves(base.params))
    chosen = [
        f"--{flag.name.replace('_', '-')} {getattr(filled, flag.name):g}"
        for flag in fields(filled)
        if getattr(given, flag.name) is None and isinstance(getattr(filled, flag.name), int | float)
    ]
    if chosen:
        run.say(f"{stage}: chosen for a pretrained model of {size / 1e6:.3g} million weights: {' '.join(chosen)}")


def open_task(cfg: Any, run: Run, *, first: str | None = None) -> Task:
    """The model and the data that the flags name; without any files the controlled world.

    There a stage that needs a policy to start from has it made by the stage `first`. Raises UserError for a model
    or files that cannot be used.
    """
    files = {name: source_of(cfg, name) for name in ("demonstrations", "comparisons", "prompts", "unpaired")}
    run.inputs(
        model=cfg.model, reference=getattr(cfg, "reference", None),
        **{name: source.names for name, source in files.items() if source is not None},
    )  # fmt: skip
    precision = PRECISIONS[cfg.precision]
    if not any(files.values()):
        refuse_in_the_world(cfg)
        folder = cfg.model or (made_first(cfg, run, first) / "policy" if first else None)
        base = None if folder is None else load_policy(str(folder), precision)
        keep_freed_memory()
        world = World(cfg.seed, base=base, precision=precision)
        world.eval_batch_size = getattr(cfg, "eval_batch_size", None) or world.eval_batch_size
        return world
    if cfg.model is None:
        given = next(name for name, source in files.items() if source is not None)
        raise UserError(f"--{given} needs --model: a Hugging Face folder or hub name to start from")
    return TextTask(
        load_policy(cfg.model, precision), run, {name: source for name, source in files.items() if source is not None},
        seed=cfg.seed, max_length=cfg.max_length, max_new_tokens=cfg.max_new_tokens,
        eval_batch_size=cfg.eval_batch_size or 16, limit=cfg.limit, heldout=cfg.heldout, on_bad_row=cfg.on_bad_row,
        streaming=getattr(cfg, "streaming", False),
    )  # fmt: skip


def refuse_in_the_world(cfg: Any) -> None:
    """Raises UserError for a flag that is about files, where there are none: nothing is passed over in silence."""
    unused = {"max_length": None, "max_new_tokens": None, "limit": None, "streaming": False, "on_bad_row": "stop"}
    for name, default in unused.items():
        if getattr(cfg, name, default) != default:
            raise UserError(f"--{name.replace('_', '-')} is about files, and without files nothing would use it")


def source_of(cfg: Any, kind: str) -> Source | None:
    """The files that the flags of one kind name; None where they name none."""
    given = names(getattr(cfg, kind, None))
    if not given:
        return None
    return Source(
        kind, given, getattr(cfg, f"{kind}_format", None), getattr(cfg, f"{kind}_columns", ()),
        getattr(cfg, f"{kind}_weights", ()),
    )  # fmt: skip


def made_first(cfg: Any, run: Run, name: str, **given: Any) -> Path:
    """The folder of another stage inside of this run's. The stage is run now, if it has not been."""
    folder = run.dir / name
    begun, done = from_first(lambda: [(folder / file).exists() for file in ("config.json", "summary.json")])
    if not done:
        stage = importlib.import_module(f"experiments.{name}")
        run.say(f"{name} comes first: {folder}")
        shared = {flag: getattr(cfg, flag) for flag in ("seed", "precision", "mesh")}
        run.keep_folder()
        stage.main(stage.Config(run_dir=str(folder), resume=begun, **shared, **given))
    return folder


def policy_sampler(cfg: Any, task: Task) -> PolicySampler:
    """Samples at temperature 1 for measuring."""
    base = task.base
    return make_sampler(
        base.config, seed=cfg.seed, max_new_tokens=task.max_new_tokens, temperature=1.0, eos_id=base.eos_id,
        pad_id=base.pad_id, batch_size=task.eval_batch_size,
    )  # fmt: skip


def open_reference(cfg: Any, task: Task) -> Params | None:
    """The parameters of --reference; None where it is what training starts from."""
    if cfg.reference is None:
        return None
    return load_reference(cfg.reference, task.base, PRECISIONS[cfg.precision])


@contextmanager
def open_rewards(cfg: Any, run: Run, task: Task) -> Iterator[Rewards]:
    """The rewards that the flags name, while the `with` lasts; in the controlled world, by default, a reward model
    that is made first. Raises UserError without any reward, and for what cannot be read."""
    models, functions = names(cfg.reward_model), names(cfg.reward)
    watched = names(cfg.watch)
    files = [text.rpartition(":")[0] if ".py:" in text else text for text in (*functions, *watched)]
    run.inputs(reward_model=models, reward=files[: len(functions)], watch=files[len(functions) :])
    if not models and not functions and isinstance(task, World):
        model = cfg.model or str(run.dir / "sft" / "policy")
        models = (str(made_first(cfg, run, "reward_model", model=model) / "reward_model"),)
    with load_rewards(
        task, policy_sampler(cfg, task), models=models, functions=functions, weights=cfg.reward_weights,
        watched=watched, precision=PRECISIONS[cfg.precision],
        limits=Limits(seconds=cfg.reward_time_limit, jobs=cfg.reward_jobs), failed_score=cfg.no_end_score,
        max_failed_share=cfg.reward_max_failed,
    ) as rewards:  # fmt: skip
        yield rewards


def preference_defaults(cfg: Any, base: Pretrained, rows: int, learning_rate: float) -> Any:
    """The flags of a preference loss, with numbers where none are given."""
    if base.name is None:
        return or_default(cfg, steps=200, batch_size=64, learning_rate=learning_rate, lora_rank=0)
    size = min(rows, cfg.batch_size or 8)
    return or_default(cfg, steps=max(1, rows // size), batch_size=8, **pretrained_defaults(cfg, base, slower=10.0))


def train_preference(
    cfg: Any,
    loss: PreferenceLoss,
    implicit_reward: ImplicitReward,
    base: Pretrained,
    examples: Examples,
    comparisons: Comparisons | None,
    run: Run,
    seed: int,
    *,
    stage: str,
    eval_batch_size: int,
    reference: Params | None = None,
    mismatched: bool = False,
    measure: Callable[[Params, Params, int], dict[str, Any]] | None = None,
) -> Trained:
    """`train_preferences` with the numbers of the flags."""
    filled = preference_defaults(cfg, base, len(examples.groups), 5e-4)
    say_defaults(run, stage, cfg, filled, base)
    show = ("loss", "val_accuracy", "kl_k1", "utility")
    return train_preferences(
        loss, implicit_reward, base, examples, None if comparisons is None else comparisons.heldout,
        filled.make_loop(run, stage, filled.steps, show=show, log_every=20), seed,
        split=filled.split_trainable, optimizer=filled.make_optimizer(filled.steps), batch_size=filled.batch_size,
        accumulate=filled.accumulate, packed=comparisons is None or comparisons.packed,
        eval_batch_size=eval_batch_size, evaluations=filled.evaluations, reference=reference, mismatched=mismatched,
        measure=measure,
    )  # fmt: skip


def preference_stage(
    cfg: Any, stage: str, who: str, loss: PreferenceLoss, implicit_reward: ImplicitReward, *, single: bool = False
) -> dict[str, float]:
    """A run of one preference loss: reads, trains, compares the policy with where it started, exports.

    `single`: the loss takes answers one by one (KTO), from `--unpaired` or from comparisons taken apart.
    """
    with run_with_report(cfg, stage, preference_report(stage, who)) as run:
        task = open_task(cfg, run, first="sft")
        sampler = policy_sampler(cfg, task)
        alone = single and cfg.unpaired
        comparisons = None if alone else task.comparisons(partial(sampler, task.base.params))
        if comparisons is None:
            assert isinstance(task, TextTask)
            examples = task.unpaired()
        else:
            examples = paired(comparisons.train, cfg.pairs)
            examples = singly(examples) if single else examples
        trained = train_preference(
            cfg, loss, implicit_reward, task.base, examples, comparisons, run, cfg.seed, stage=stage,
            eval_batch_size=task.eval_batch_size, reference=open_reference(cfg, task), mismatched=single,
            measure=make_policy_measure(task, sampler, task.eval_batch_size),
        )  # fmt: skip
        metrics = {f"{stage}_{name}": value for name, value in trained.metrics.items()}
        metrics |= task.facts | ({} if comparisons is None else comparisons.facts)
        metrics |= compare_policies(
            run,
            task,
            ("start", task.base.params),
            (stage, trained.params),
            sampler,
            make_token_scorer(task, trained.reward),
        )
        run.summary(metrics)
        export_policy(run, task.base, trained.params, algorithm=who, metrics=metrics)
    return metrics
