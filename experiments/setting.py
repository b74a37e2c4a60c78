"""Where the stages get their text: the controlled world by default, real text (`experiments/text.py`) with --model,
--demonstrations and --comparisons.

Both give the same `Setting`; only the world has a `judge` that knows the true utility.
"""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from rlhf_jax.batches import Completions, PackedRankings, Prompts, Rankings, Tokens
from rlhf_jax.data.rejects import OnBadRow, Rejects
from rlhf_jax.data.sample import sample
from rlhf_jax.data.tokens import join, pack_sequences, pad_prompts, pad_sequences, take
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.log import Run
from rlhf_jax.models import BFLOAT16, FLOAT32, MIXED, ModelConfig, Precision
from rlhf_jax.simulation import Annotators, Demonstrators, agreement_rate, calibrate_noise, ceiling
from rlhf_jax.simulation.world import Problem, draw_problems, make_tokenizer, utilities

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
PrecisionName = Literal["float32", "mixed", "bfloat16"]
PRECISIONS: dict[PrecisionName, Precision] = {"float32": FLOAT32, "mixed": MIXED, "bfloat16": BFLOAT16}
Sampler = Callable[[Prompts, int], Completions]
"""sampler(prompts, seed) -> numpy Completions of the model after SFT."""


class Comparisons(NamedTuple):
    """What people said of the SFT model's answers (or of those in a file)."""

    train: Rankings
    heldout: Rankings
    facts: dict[str, float]
    """What the world knows of its annotators: their agreement, and the ceiling that their noise sets."""
    pack: Callable[[np.ndarray], PackedRankings] | None = None
    """The training rankings of those prompts, packed; None where they are short and of one length."""


class Setting(NamedTuple):
    """Everything the three stages need, before any training."""

    model: ModelConfig
    params: Any
    """Pretrained weights, or None to start from an initialisation."""
    tokenizer: PreTrainedTokenizerBase
    demonstrations: Tokens
    validation: Tokens
    prompts: Prompts
    heldout: Prompts
    shifted: Prompts | None
    """Held-out prompts of another distribution."""
    max_new_tokens: int
    compare: Callable[[Sampler], Comparisons]
    judge: Callable[[Prompts, Completions], Float[np.ndarray, " B"]] | None
    """True utility of completions; only for measuring."""
    facts: dict[str, float]
    notes: tuple[str, ...] = ()
    """As what the files were read."""
    rejects: Rejects | None = None
    """Which rows could not be used, and why."""
    batches: Callable[[int, int], "grain.DatasetIterator[Tokens]"] | None = None
    """batches(batch_size, seed): endless batches of demonstrations; None: `demonstrations` in a shuffled order."""
    streaming: bool = False
    """Whether `demonstrations` are only the first of those that `batches` gives."""

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_id

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    def read(self, prompts: Prompts) -> list[str]:
        """Prompts as text, for people."""
        rows = (ids[mask] for ids, mask in zip(np.asarray(prompts.tokens), np.asarray(prompts.mask), strict=True))
        return self.tokenizer.batch_decode([list(map(int, ids)) for ids in rows])

    def answers(self, completions: Completions) -> tuple[list[str], np.ndarray]:
        """Completions as text without special tokens, and whether each ended by itself."""
        tokens, mask = np.asarray(completions.tokens), np.asarray(completions.mask)
        ended = ((tokens == self.eos_id) & mask).any(axis=1)
        rows = [list(map(int, ids[real])) for ids, real in zip(tokens, mask, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True), ended


@dataclass(frozen=True)
class Source:
    """The flags that every experiment shares."""

    run_dir: str | None = None
    """Where the run is written; by default the next free runs/<experiment>-<n>."""
    seed: int = 0
    resume: bool = False
    """Go on from the last whole checkpoint in run-dir."""
    mesh: str | None = None
    """Devices as a mesh, such as fsdp=8,tensor=4: data=N for copies of the model, fsdp=N for parts of its parameters,
    tensor=N for parts of each layer's work; one N may be -1, all that are left. By default one device; where there are
    many processes, data=-1."""
    hosts: str | None = None
    """One of many processes: ADDRESS:PORT of the first, how many, number of this one, as in 10.0.0.1:8476,4,0. By
    default from the environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; SLURM; Open MPI; TPU."""
    model: str | None = None
    """A Hugging Face folder (safetensors) or hub name to start from, with its tokenizer; else a small new model."""
    precision: PrecisionName = "float32"
    """mixed: weights float32, arithmetic bfloat16, head float32. bfloat16: all but norms, adapters, logits, losses."""
    demonstrations: str | tuple[str, ...] | None = None
    """Files, folders or names on the Hub, NAME[:SPLIT]; by default the world's demonstrators write."""
    demonstrations_format: str | None = None
    """messages, sharegpt, prompt_completion, alpaca or text; by default recognised from the columns."""
    demonstrations_columns: tuple[str, ...] = ()
    """What its columns are called, OURS=THEIRS, as in prompt=question completion=answer."""
    demonstrations_weights: tuple[float, ...] = ()
    """How often each source is drawn from; by default as large as it is (streamed: all equally)."""
    comparisons: str | tuple[str, ...] | None = None
    """As demonstrations; by default the world's annotators rank the SFT model's answers."""
    comparisons_format: str | None = None
    """preference, instruction_preference, transcripts, ranking or scored; by default recognised."""
    comparisons_columns: tuple[str, ...] = ()
    """What its columns are called, OURS=THEIRS."""
    comparisons_weights: tuple[float, ...] = ()
    """Shares of the sources; as many comparisons are used as these allow without repeating one."""
    prompts: str | tuple[str, ...] | None = None
    """What PPO answers, a column prompt; by default the comparisons' prompts."""
    prompts_format: str | None = None
    """prompts; by default recognised."""
    prompts_columns: tuple[str, ...] = ()
    """What its columns are called, OURS=THEIRS."""
    on_bad_row: OnBadRow = "stop"
    """Stop at a row that cannot be used, or skip, count and write it to rejected.jsonl in the run's folder."""
    streaming: bool = False
    """Read demonstrations as they are needed, for sets larger than memory; they are shuffled in a window."""
    max_length: int = 256
    """Real text: tokens of prompt and response together. Longer prompts lose their beginning."""
    max_new_tokens: int = 32
    """Real text: the longest answer that is sampled."""


def load_setting(source: Source) -> Setting:
    """The world, or the real text that the flags name. Raises UserError when only some of them are given."""
    at_least(source, seed=0, max_length=1, max_new_tokens=1)
    given = [source.model, source.demonstrations, source.comparisons]
    if not any(given):
        keep_freed_memory()
        return world_setting(source.seed, PRECISIONS[source.precision])
    if not all(given):
        raise UserError("real text needs all three of --model, --demonstrations and --comparisons")
    from experiments.text import text_setting  # it is made of what is defined here

    return text_setting(source)


def keep_freed_memory() -> None:
    """Has the C library (glibc) keep what XLA frees.

    It gives large buffers back to the kernel, which clears them page by page when they are had again: at every step.
    Outside PPO that costs larger models more memory than it is worth (experiments/results/speed.md).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            libc.mallopt(option, value)


def announce(setting: Setting, run: Run) -> None:
    """What a run says first: what was read, what was left out (also in rejected.jsonl), and a sample of the tokens."""
    for note in setting.notes:
        run.say(note)
    if setting.rejects is not None:
        if run.first:
            setting.rejects.write_to(run.dir / "rejected.jsonl")
        for line in setting.rejects.summary():
            run.say(line)
    run.say("a demonstration; what is learned is coloured, or in [[brackets]]:")
    run.show(lambda colour: sample(setting.demonstrations, setting.tokenizer, colour=colour))


# The controlled world. Sizes as in `simulation`: a prompt has at most 14 tokens (16 shifted), an answer 20.
DEMONSTRATIONS, COMPARED, RANKED, HELDOUT_PAIRS, PROMPTS, HELDOUT = 32_000, 12_000, 8, 4096, 8192, 512
VALIDATION, LAYERS = 1024, 3
AGREEMENT = 0.73
PROMPT_LENGTH, ANSWER_LENGTH, PACKED_LENGTH = 16, 20, 64


def world_setting(seed: int, precision: Precision = FLOAT32) -> Setting:
    """The controlled world: demonstrators with a ceiling, annotators who agree 73% of the time."""
    rng = np.random.default_rng([seed, 0])
    tokenizer = make_tokenizer()
    pad_id = tokenizer.pad_token_id

    def encode(problems: list[Problem]) -> Prompts:
        messages = [[{"role": "user", "content": p.prompt}] for p in problems]
        texts = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return pad_prompts(ids, length=PROMPT_LENGTH, pad_id=pad_id)

    people = Demonstrators()

    def demonstrate(problems: list[Problem]) -> tuple[list[tuple[list[int], list[int]]], np.ndarray]:
        prompts = encode(problems)
        texts = [people.write(rng, p) for p in problems]
        answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
        pairs = [
            (ids[mask].tolist(), [*answer, tokenizer.eos_token_id])
            for ids, mask, answer in zip(prompts.tokens, prompts.mask, answers, strict=True)
        ]
        return pairs, utilities(problems, texts, [True] * len(texts))

    pairs, written = demonstrate(draw_problems(rng, DEMONSTRATIONS))
    demonstrations = pack_sequences(pairs, length=PACKED_LENGTH, pad_id=pad_id)
    pairs, _ = demonstrate(draw_problems(rng, VALIDATION))
    validation = pad_sequences(pairs, length=PROMPT_LENGTH + ANSWER_LENGTH, pad_id=pad_id)
    problems = draw_problems(rng, COMPARED + HELDOUT_PAIRS + PROMPTS + HELDOUT)
    problems += draw_problems(rng, HELDOUT, shifted=True)
    everything = encode(problems)
    cuts = np.cumsum([COMPARED, HELDOUT_PAIRS, PROMPTS, HELDOUT])
    compared, compared_heldout, prompts, heldout, shifted = (
        take(everything, rows) for rows in np.split(np.arange(len(problems)), cuts)
    )

    def judge(prompts: Prompts, completions: Completions) -> np.ndarray:
        texts, ended = setting.answers(completions)
        return utilities([problems[row] for row in np.asarray(prompts.row)], texts, ended.tolist())

    def compare(sample: Sampler) -> Comparisons:
        rankings, noise, facts = [], None, {}
        for number, (some, count) in enumerate([(compared, RANKED), (compared_heldout, 2)]):
            repeated = take(some, np.repeat(np.arange(len(some.row)), count))
            answers = sample(repeated, number)
            texts, _ = setting.answers(answers)
            blind = Annotators(noise=0.0)
            perceived = blind.perceive(judge(repeated, answers), texts).reshape(-1, count)
            differences = perceived[:, 0] - perceived[:, 1]
            if noise is None:
                noise = calibrate_noise(differences, AGREEMENT)
            annotators = Annotators(noise=noise)
            ranks = annotators.rank(rng, perceived)
            again = annotators.rank(rng, perceived)
            facts = {
                "annotator_noise": noise,
                "annotator_agreement_expected": agreement_rate(differences, noise),
                "annotator_agreement": float(np.mean((ranks[:, 0] < ranks[:, 1]) == (again[:, 0] < again[:, 1]))),
                "ceiling": ceiling(differences, noise),
            }
            tokens = jax.tree.map(np.asarray, join(repeated, answers, pad_id=pad_id))
            rankings.append(Rankings(tokens, ranks, np.ones(ranks.shape, bool)))
        return Comparisons(rankings[0], rankings[1], facts)

    model = ModelConfig(
        vocab_size=len(tokenizer), d_model=64, n_layers=LAYERS, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=128,
        rope_theta=10_000.0, norm_eps=1e-5, tie_embeddings=True, max_length=PROMPT_LENGTH + ANSWER_LENGTH,
        precision=precision,
    )  # fmt: skip
    facts = {
        "demonstrators_utility": float(written.mean()),
        "demonstrators_utility_se": float(written.std() / np.sqrt(len(written))),
        "demonstrators_utility_std": float(written.std()),
    }
    setting = Setting(
        model, None, tokenizer, demonstrations, validation, prompts, heldout, shifted,
        ANSWER_LENGTH, compare, judge, facts,
    )  # fmt: skip
    return setting
