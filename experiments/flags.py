"""The flags that several experiments share, as dataclasses that a Config inherits from; it takes those that it uses.

They are the run, the model, the data and the rewards; those of training are in `training`. A Config names its own
flags' class last, so that `--help` shows them first.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlhf_jax.ensemble import Combination
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.models import BFLOAT16, FLOAT32, MIXED, Precision
from rlhf_jax.pretrained import Layout
from rlhf_jax.rewards.server import is_server
from rlhf_jax.tasks.rewards import Ensemble
from rlhf_jax.tasks.text import Source

PrecisionName = Literal["float32", "mixed", "bfloat16"]
PRECISIONS: dict[PrecisionName, Precision] = {"float32": FLOAT32, "mixed": MIXED, "bfloat16": BFLOAT16}


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
    sequence=N for parts of each long sequence, tensor=N for parts of each layer's work; one N may be -1, all that are
    left. By default one device; where there are many processes, data=-1."""
    hosts: str | None = None
    """One of many processes: ADDRESS:PORT of the first, how many, number of this one, as in 10.0.0.1:8476,4,0. By
    default from the environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; SLURM; Open MPI; TPU."""

    compile_cache: str | None = None
    """The folder in which compiled programs are kept for later runs, or none. By default JAX_COMPILATION_CACHE_DIR,
    else rlhf_jax in the user's cache folder."""

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
    scan_layers: bool | None = None
    """Compile one layer for all of them: a deep model then compiles as fast as a shallow one. By default for models
    of more than 8 layers."""
    remat: bool | None = None
    """Compute each layer's activations again in the backward pass, which costs time and saves most of the memory. By
    default where layers are scanned."""
    max_length: int | None = None
    """Tokens of prompt and answer together. By default as long as the data are, at most 1024 and the model's limit."""

    def layout(self) -> Layout:
        """How the models that a run reads compute."""
        return Layout(PRECISIONS[self.precision], self.scan_layers, self.remat)


@dataclass(frozen=True)
class SamplingFlags(Flags):
    """How a policy is measured."""

    max_new_tokens: int | None = None
    """The longest answer that is sampled, in tokens. By default 128, and at most a quarter of max-length."""
    eval_batch_size: int | None = None
    """Rows that are sampled or scored at once where nothing is trained. By default 1024 in the controlled world, else
    as many as take 256 MB a device, or an eighth of the model's memory, in one layer; at most 256."""

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
    rows_cache: str | None = None
    """The folder that keeps encoded rows for the next run, by default rlhf_jax/rows in the user's cache folder, or
    none: they are then in the folder for temporary files while the run lasts. What is made in two seconds is not kept;
    what is not read for a month goes, and the oldest beyond 50 GB."""
    num_proc: int | None = None
    """Processes that encode rows where there are thousands; by default one for each core, at most 8."""

    def __post_init__(self) -> None:
        at_least(self, heldout=1)
        if self.limit is not None:
            at_least(self, limit=2)
        if self.num_proc is not None:
            at_least(self, num_proc=1)
        super().__post_init__()

    def sources(self) -> dict[str, Source]:
        """All files that the flags name, by their kind. Raises UserError for flags about files that are not given."""
        return {}


@dataclass(frozen=True)
class StreamFlags(DataFlags):
    """Rows that are read while training goes on."""

    streams_prompts: ClassVar[bool] = False
    """Whether prompts to train on are streamed, too."""
    streaming: bool = False
    """Read demonstrations and comparisons as they are needed, and prompts where answers to them are learned from, for
    sets larger than the disk has room for twice. The files of a folder come in a new order each time, and their rows
    are shuffled in a window. Of the first 2560 rows some are held out. Prompts of several files are drawn alike."""
    shuffle_window: int | None = None
    """Rows of that window, by default 1024; of prompts whole rows are kept, with all columns."""

    def __post_init__(self) -> None:
        """Raises UserError for a window of rows that are not streamed."""
        if self.shuffle_window is not None:
            at_least(self, shuffle_window=1)
            if not self.streaming:
                raise UserError("--shuffle-window is about --streaming; other rows are shuffled as a whole")
        super().__post_init__()


@dataclass(frozen=True)
class DemonstrationFlags(StreamFlags):
    """Prompts with answers to imitate."""

    demonstrations: str | tuple[str, ...] | None = None
    """Files, folders or names on the Hub, NAME[:SPLIT]."""
    demonstrations_format: str | None = None
    """messages, sharegpt, prompt_completion, alpaca or text; by default recognised from the columns."""
    demonstrations_columns: tuple[str, ...] = ()
    """Names of the columns in the files, OURS=THEIRS, as in prompt=question completion=answer."""
    demonstrations_weights: tuple[float, ...] = ()
    """How often each source is drawn from; by default as large as it is (streamed: all equally)."""

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
class ComparisonFlags(StreamFlags):
    """Answers of which people preferred some."""

    comparisons: str | tuple[str, ...] | None = None
    """Files, folders or names on the Hub, NAME[:SPLIT]."""
    comparisons_format: str | None = None
    """preference, instruction_preference, transcripts, ranking or scored; by default recognised."""
    comparisons_columns: tuple[str, ...] = ()
    """Names of the columns in the files, OURS=THEIRS."""
    comparisons_weights: tuple[float, ...] = ()
    """Shares of the sources; as many comparisons are used as these allow without repeating one (streamed: without an
    end)."""
    comparisons_clamp: float | None = None
    """The highest probability that a label may have, such as 0.6; the lowest is 1 minus that (Bai et al. 2022). For
    files with a column probability; rows without one keep their label."""

    def __post_init__(self) -> None:
        """Raises UserError for a probability that is none."""
        if self.comparisons_clamp is not None and not 0.5 < self.comparisons_clamp < 1:
            raise UserError(f"comparisons-clamp is {self.comparisons_clamp}; it must be between 0.5 and 1")
        super().__post_init__()

    def sources(self) -> dict[str, Source]:
        """All files that the flags name, by their kind. Raises UserError for flags about files that are not given."""
        own = source(
            "comparisons",
            self.comparisons,
            self.comparisons_format,
            self.comparisons_columns,
            self.comparisons_weights,
        )
        if self.comparisons_clamp and not own:
            raise UserError("--comparisons-clamp is about the files of --comparisons, and there are none")
        own = {kind: files._replace(clamp=self.comparisons_clamp) for kind, files in own.items()}
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
    """Weights of the reward models (of an ensemble one), then of the functions, in their order; by default 1 each."""
    reward_ensemble: Combination | None = None
    """All reward models, of one shape and with the policy's tokenizer, are one reward: their mean, their least score
    (min), mean − λ·std (lower), mean − λ·variance (uwo), or one model with their mean weights. Without files, in the
    controlled world, four are made first. By default they are a weighted sum."""
    ensemble_lambda: float | None = None
    """λ of lower and uwo, by default 1."""
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
        models, functions = len(names(self.reward_model)), len(names(self.reward))
        if self.reward_ensemble and models < 2 and models + functions:
            raise UserError(f"reward-ensemble is of two or more reward models, and there are {models}")
        if self.ensemble_lambda is not None:
            at_least(self, ensemble_lambda=0)
            if self.reward_ensemble not in ("lower", "uwo"):
                raise UserError("ensemble-lambda is about --reward-ensemble lower or uwo")
        given = (1 if self.reward_ensemble else models) + functions
        if self.reward_weights and len(self.reward_weights) != given:
            raise UserError(f"{len(self.reward_weights)} reward-weights for {given} rewards")
        super().__post_init__()

    def ensemble(self) -> Ensemble | None:
        """How reward models become one; None where they are a weighted sum."""
        lam = 1.0 if self.ensemble_lambda is None else self.ensemble_lambda
        return None if self.reward_ensemble is None else Ensemble(self.reward_ensemble, lam)


@dataclass(frozen=True)
class JudgeFlags(Flags):
    """The judge: a language model that says which of two answers is better."""

    judge: str | None = None
    """A Hugging Face folder or hub name, or the URL of an OpenAI-compatible server: http://127.0.0.1:8000/v1."""
    judge_model: str | None = None
    """The model's name at the server."""
    judge_key: str = "OPENAI_API_KEY"
    """The environment variable that has the server's API key; a server of one's own may need none."""
    judge_cache: str | None = None
    """The file that keeps the server's answers, so that none is paid for twice; by default judge.sqlite in the run's
    folder."""
    judge_at_once: int = 8
    """Requests to the server at once."""
    judge_max_requests: int | None = None
    """The most requests to the server in all; at the limit the run stops, and may go on with --resume."""
    judge_time_limit: float = 60.0
    """Seconds that the server may take for an answer."""
    judge_max_failed: float = 0.05
    """The share of the questions on which the judge may fail."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range, a server without a model, and a model without a server."""
        at_least(self, judge_at_once=1, judge_time_limit=1e-3, judge_max_failed=0)
        if self.judge_max_requests is not None:
            at_least(self, judge_max_requests=1)
        if is_server(self.judge) != (self.judge_model is not None):
            raise UserError("--judge URL and --judge-model NAME are given together: a server may have several models")
        super().__post_init__()


@dataclass(frozen=True)
class GroupConfig(RunFlags, SamplingFlags, ReferenceFlags, ModelFlags, PromptFlags, StreamFlags, RewardFlags):
    """The model, the prompts and the rewards of a stage without a critic."""

    streams_prompts = True

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


def refuse_forms(cfg: Any, *kinds: str) -> None:
    """Raises UserError for flags about the form of files that are read together with the run's own."""
    for kind in kinds:
        for name in ("format", "columns", "weights"):
            if getattr(cfg, f"{kind}_{name}"):
                raise UserError(f"--{kind}-{name} cannot be given here, where rows of the run's own are mixed in")


def refuse_without_files(cfg: Any, *flags: str) -> None:
    """Raises UserError for flags that the controlled world, where there are no files, does not use."""
    for name in flags:
        if getattr(cfg, name) and not cfg.sources():
            raise UserError(f"--{name.replace('_', '-')} is not used without files: the controlled world has its own")


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
