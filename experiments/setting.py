"""Where the stages get their text: the controlled world by default, real files with --model and two data files.

Both give the same `Setting`; only the world has a `judge` that knows the true utility.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_jax.batches import Completions, Prompts, Rankings, Tokens
from rlhf_jax.data.text import (
    Report,
    encode_comparisons,
    encode_demonstrations,
    encode_prompts,
    read_comparisons,
    read_demonstrations,
)
from rlhf_jax.data.tokens import join, pack_sequences, pad_prompts, pad_sequences, take
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.models import ModelConfig, load_hf
from rlhf_jax.simulation import Annotators, Demonstrators, agreement_rate, calibrate_noise, ceiling
from rlhf_jax.simulation.world import Problem, draw_problems, make_tokenizer, utilities

Sampler = Callable[[Prompts, int], Completions]
"""sampler(prompts, seed) -> numpy Completions of the model after SFT."""


class Comparisons(NamedTuple):
    """What people said of the SFT model's answers (or of those in a file)."""

    train: Rankings
    heldout: Rankings
    facts: dict[str, float]
    """What the world knows of its annotators: their agreement, and the ceiling that their noise sets."""


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
    """What could not be used of the files, and why."""

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
    model: str | None = None
    """A Hugging Face folder (safetensors) or hub name to start from, with its tokenizer; else a small new model."""
    demonstrations: str | None = None
    """jsonl[.gz] of instruction/input/output or prompt/completion; by default the world's demonstrators write."""
    comparisons: str | None = None
    """jsonl[.gz] of chosen/rejected; by default the world's annotators rank the SFT model's answers."""
    max_length: int = 256
    """Real text: tokens of prompt and response together. Longer prompts lose their beginning."""
    max_new_tokens: int = 32
    """Real text: the longest answer that is sampled."""


def load_setting(source: Source) -> Setting:
    """The world, or the real text that the flags name. Raises UserError when only some of them are given."""
    at_least(source, seed=0, max_length=1, max_new_tokens=1)
    given = [source.model, source.demonstrations, source.comparisons]
    if not any(given):
        return world_setting(source.seed)
    if not all(given):
        raise UserError("real text needs all three of --model, --demonstrations and --comparisons")
    return text_setting(source)


# The controlled world. Sizes as in `simulation`: a prompt has at most 14 tokens (16 shifted), an answer 20.
DEMONSTRATIONS, COMPARED, RANKED, HELDOUT_PAIRS, HELDOUT = 32_000, 12_000, 8, 4096, 512
AGREEMENT = 0.73
PROMPT_LENGTH, ANSWER_LENGTH, PACKED_LENGTH = 16, 20, 64


def world_setting(seed: int) -> Setting:
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
    pairs, _ = demonstrate(draw_problems(rng, 1024))
    validation = pad_sequences(pairs, length=PROMPT_LENGTH + ANSWER_LENGTH, pad_id=pad_id)
    problems = draw_problems(rng, COMPARED + HELDOUT_PAIRS + 8192 + HELDOUT)
    problems += draw_problems(rng, HELDOUT, shifted=True)
    everything = encode(problems)
    cuts = np.cumsum([COMPARED, HELDOUT_PAIRS, 8192, HELDOUT])
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
        vocab_size=len(tokenizer), d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=128,
        rope_theta=10_000.0, norm_eps=1e-5, tie_embeddings=True, max_length=PROMPT_LENGTH + ANSWER_LENGTH,
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


HELDOUT_SHARE = 0.1


def text_setting(source: Source) -> Setting:
    """Real text: a pretrained model, demonstrations and comparisons from files.

    A tenth of the demonstrations, and of the comparisons by the first turn of their conversation, is held out.
    """
    assert source.model and source.demonstrations and source.comparisons
    try:
        config, params = load_hf(source.model)
        tokenizer = AutoTokenizer.from_pretrained(source.model, local_files_only=Path(source.model).is_dir())
    except (ValueError, OSError) as error:
        raise UserError(str(error).splitlines()[0]) from None
    if source.max_length > config.max_length:
        raise UserError(f"--max-length {source.max_length} is more than the model's {config.max_length}")
    prompt_length = source.max_length - source.max_new_tokens
    if prompt_length < 8:
        raise UserError(f"--max-new-tokens {source.max_new_tokens} leaves no room for prompts in --max-length")
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rng = np.random.default_rng([source.seed, 0])

    demonstrations, demonstrations_report = read_demonstrations(source.demonstrations)
    pairs, encoded_report = encode_demonstrations(demonstrations, tokenizer, source.max_length)
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    cut = max(1, int(HELDOUT_SHARE * len(pairs)))

    comparisons, comparisons_report = read_comparisons(source.comparisons)
    openings = sorted({row.prompt[0]["content"] for row in comparisons})
    kept = max(1, int(HELDOUT_SHARE * len(openings)))
    heldout_openings = {openings[i] for i in rng.permutation(len(openings))[:kept]}
    parts = [
        [row for row in comparisons if (row.prompt[0]["content"] in heldout_openings) == heldout]
        for heldout in (False, True)
    ]
    rankings, prompts, reports = [], [], []
    for rows in parts:
        triples, report = encode_comparisons(rows, tokenizer, source.max_length)
        if not triples:
            raise UserError(f"{source.comparisons}: too few comparisons to train on some and hold out others")
        reports.append(report)
        # The preferred one is not always first: nothing may learn the place.
        ranks = np.where(rng.random((len(triples), 1)) < 0.5, [0, 1], [1, 0]).astype(np.int32)
        both = [(t[0], t[1 + rank]) for t, row in zip(triples, ranks.tolist(), strict=True) for rank in row]
        tokens = pad_sequences(both, length=source.max_length, pad_id=pad_id)
        rankings.append(Rankings(tokens, ranks, np.ones(ranks.shape, bool)))
        ids = encode_prompts([row.prompt for row in rows], tokenizer)
        prompts.append(pad_prompts([shorten(i, prompt_length) for i in ids], length=prompt_length, pad_id=pad_id))
    heldout = take(prompts[1], np.arange(min(HELDOUT, len(prompts[1].row))))
    notes = [
        *describe(source.demonstrations, len(demonstrations), demonstrations_report, encoded_report),
        *describe(source.comparisons, len(comparisons), comparisons_report, *reports),
    ]
    return Setting(
        config,
        params,
        tokenizer,
        demonstrations=pack_sequences(pairs[cut:], length=source.max_length, pad_id=pad_id),
        validation=pad_sequences(pairs[:cut], length=source.max_length, pad_id=pad_id),
        prompts=prompts[0],
        heldout=heldout,
        shifted=None,
        max_new_tokens=source.max_new_tokens,
        compare=lambda sample: Comparisons(rankings[0], rankings[1], {}),
        judge=None,
        facts={},
        notes=tuple(notes),
    )


def shorten(ids: list[int], length: int) -> list[int]:
    """A prompt without its beginning, where it is too long; its first token (BOS) stays."""
    return ids if len(ids) <= length else ids[:1] + ids[len(ids) - length + 1 :]


def describe(path: str, rows: int, *reports: Report) -> list[str]:
    """What was read of a file and, reason by reason, which lines were not used or were changed."""
    lines: dict[str, list[int]] = {}
    for report in reports:
        for reason, numbers in report.items():
            lines.setdefault(reason, []).extend(numbers)
    notes = [f"{path}: {rows} rows read"]
    for reason, numbers in lines.items():
        some = ", ".join(str(n) for n in sorted(numbers)[:5]) + (", …" if len(numbers) > 5 else "")
        notes.append(f"{path}: {reason}: {len(numbers)} rows (lines {some})")
    return notes
