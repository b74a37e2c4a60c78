"""Answers to any number of prompts, in batches of few shapes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.data.tokens import take
from rlhf_jax.models import ModelConfig, Transformer
from rlhf_jax.sampling.ends import EosId
from rlhf_jax.sampling.generate import generate
from rlhf_jax.sharding import shard_batch, to_host
from rlhf_jax.types import Params

SHORTEST = 16
"""Tokens of the narrowest batch."""


def sample_answers(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    key: PRNGKeyArray,
    *,
    answers: int = 1,
    max_new_tokens: int,
    temperature: float,
    eos_id: EosId,
    pad_id: int,
    batch_size: int,
) -> Completions:
    """`answers` answers to each of B prompts, as numpy arrays [B·answers, max_new_tokens], prompt-major.

    At most `batch_size` rows are sampled at once, prompts of like length together. Temperature 0 is greedy. An answer
    depends on the key, on its prompt and the prompt's `row`, and on how many answers to that row came before it, not
    on what is sampled with it.
    """
    rows = np.repeat(np.arange(len(prompts.row)), answers)
    lengths = np.asarray(prompts.mask).sum(axis=1)[rows]
    width = prompts.tokens.shape[1]
    tokens = np.full((len(rows), max_new_tokens), pad_id, np.int32)
    mask, logprobs = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.float32)
    streams = np.stack([np.asarray(prompts.row)[rows], times_before(np.asarray(prompts.row)[rows])], axis=1)
    for some, real, columns in like_lengths(lengths, batch_size, width):
        batch = take(prompts, rows[some])
        tokens_in, mask_in, numbers = shard_batch(
            (
                jnp.asarray(batch.tokens[:, width - columns :]),
                jnp.asarray(batch.mask[:, width - columns :]),
                jnp.asarray(streams[some].astype(np.int32)),
            )
        )
        found = to_host(
            generate(
                model, params, tokens_in, mask_in, key, streams=numbers, max_new_tokens=max_new_tokens,
                temperature=temperature, eos_id=eos_id, pad_id=pad_id,
            )
        )  # fmt: skip
        here = some[:real]
        tokens[here], mask[here], logprobs[here] = (np.asarray(x)[:real] for x in found)
    return numpy_completions(tokens, mask, logprobs)


def make_sampler(
    config: ModelConfig,
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    eos_id: EosId,
    pad_id: int,
    batch_size: int,
) -> Callable[[Params, Prompts, int], Completions]:
    """sample(params, prompts, number) -> one answer to each prompt; other numbers give other answers."""
    model = Transformer(config)

    def sample(params: Params, prompts: Prompts, number: int) -> Completions:
        return sample_answers(
            model, params, prompts, jax.random.fold_in(jax.random.key(seed), number), max_new_tokens=max_new_tokens,
            temperature=temperature, eos_id=eos_id, pad_id=pad_id, batch_size=batch_size,
        )  # fmt: skip

    return sample


def times_before(values: np.ndarray) -> np.ndarray:
    """How often each value stands before its place: [7, 5, 7, 7] gives [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, ordered, side="left")
    found = np.empty(len(values), int)
    found[order] = np.arange(len(values)) - first
    return found


def like_lengths(
    lengths: Sequence[int] | Any, most: int | Callable[[int], int], longest: int
) -> Iterator[tuple[np.ndarray, int, int]]:
    """(rows, how many of them are real, width): rows of like length together, at most so many of a width.

    Widths are powers of two, at most `longest`, and so are the numbers of rows, at most those, filled up by rows said
    again: there are few shapes, and few programs are compiled.
    """
    widths = np.array([min(longest, max(SHORTEST, 1 << (int(length) - 1).bit_length())) for length in lengths], int)
    for width in sorted(set(widths.tolist())):
        rows, size = np.flatnonzero(widths == width), most(width) if callable(most) else most
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            full = size if len(rows) > size else min(size, 1 << (len(some) - 1).bit_length())
            yield np.resize(some, full), len(some), width


def numpy_completions(tokens: Any, mask: Any, logprobs: Any) -> Completions:
    """Completions that are still numpy: `Completions` is annotated as it is on the device."""
    make: Any = Completions
    return make(tokens, mask, logprobs)
