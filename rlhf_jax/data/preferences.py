"""Answers as token ids -> batches: several to a row, or one to a row."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.batches import PackedAnswers, PackedRankings, RankedAnswers, Rankings, Tokens
from rlhf_jax.data.lazy import Lazy
from rlhf_jax.data.tokens import Ids, bucket, first_fit, host_batch, lay, pad_prompts, pad_sequences, size

Answer = tuple[Ids, Ids]
"""Ids of a prompt and of a response to it."""
Batch = TypeVar("Batch")
Packed = TypeVar("Packed", PackedAnswers, PackedRankings)


def pack_answers(
    answers: Sequence[Answer | None], *, length: int, pad_id: int, slots: int | None = None
) -> PackedAnswers:
    """N answers, several to a row of T = `length`, each a document with its prompt.

    The number of rows is a power of two, so that batches of as many answers have few shapes. None leaves a number
    without an answer; `slots` adds such numbers at the end until there are N = `slots`.
    Raises ValueError when a document is longer than `length`, or there are more answers than `slots`.
    """
    count = len(answers) if slots is None else slots
    if len(answers) > count:
        raise ValueError(f"{len(answers)} answers are more than {count}")
    numbered = [(number, answer) for number, answer in enumerate(answers) if answer is not None]
    fitted = first_fit([size(answer) for _, answer in numbered], length=length)
    fitted += [[]] * (bucket(len(fitted), smallest=1) - len(fitted))
    tokens = lay([[numbered[i][1] for i in row] for row in fitted], length, pad_id)
    owner = np.full(tokens.mask.shape, count, np.int32)
    row, column = np.zeros((2, count), np.int32)
    mask = np.zeros(count, bool)
    for r, members in enumerate(fitted):
        at = 0
        for i in members:
            number, (prompt, response) = numbered[i]
            start, end = at + len(prompt), at + len(prompt) + len(response)
            # Target t is input t + 1; as in `mask`, a document's first token is nobody's target.
            owner[r, max(start, at + 1) - 1 : end - 1] = number
            row[number], column[number], mask[number] = r, end - 1, True
            at = end
    return host_batch(PackedAnswers, tokens, owner, row, column, mask)


def pack_rankings(
    rankings: Sequence[RankedAnswers],
    *,
    length: int,
    pad_id: int,
    prompts: int | None = None,
    answers: int | None = None,
) -> PackedRankings:
    """`pack_answers` of rankings, with their ranks, margins and doubts, for reward models.

    `prompts` and `answers` fill P and K up to that many. Raises ValueError when a document is longer than `length`,
    or there are more prompts or answers than that.
    """
    ranks, mask = rank_table(rankings, prompts=prompts, answers=answers)
    packed = pack_answers(_in_table(rankings, ranks.shape[1]), length=length, pad_id=pad_id, slots=ranks.size)
    margin = _filled([ranking.margin for ranking in rankings], len(ranks))
    row, column = packed.row.reshape(ranks.shape), packed.column.reshape(ranks.shape)
    return host_batch(
        PackedRankings, packed.tokens, packed.owner, row, column, mask, ranks, margin, doubts(rankings, len(ranks))
    )


def stack_packed(batches: Sequence[Packed]) -> Packed:
    """Batches of as many answers as one, along a new first axis; empty rows make them of one length."""
    rows = max(len(batch.owner) for batch in batches)

    def longer(x: Any, value: int = 0) -> Any:
        return np.pad(x, [(0, rows - len(x)), (0, 0)], constant_values=value)

    padded = [
        batch._replace(tokens=jax.tree.map(longer, batch.tokens), owner=longer(batch.owner, batch.row.size))
        for batch in batches
    ]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *padded)


def stack_batches(parts: Sequence[Batch]) -> Batch:
    """Microbatches of numpy arrays along a new first axis; one alone stays as it is."""
    if len(parts) == 1:
        return parts[0]

    def is_packed(x: Any) -> bool:
        return isinstance(x, PackedAnswers | PackedRankings)

    return jax.tree.map(lambda *xs: stack_packed(xs) if is_packed(xs[0]) else np.stack(xs), *parts, is_leaf=is_packed)


def packed_logprobs(logprobs: Float[Array, "B T"], batch: PackedAnswers | PackedRankings) -> Float[Array, "..."]:
    """log π(y|x) of every answer, [N] or [P, K]: the sum over its own tokens.

    Traceable; 0 for numbers that only fill the batch.
    """
    real = jnp.where(batch.tokens.mask, logprobs, 0.0)
    sums = jax.ops.segment_sum(real.reshape(-1), batch.owner.reshape(-1), num_segments=batch.row.size + 1)
    return sums[:-1].reshape(batch.row.shape)


def packed_rewards(values: Float[Array, "B T"], batch: PackedAnswers | PackedRankings) -> Float[Array, "..."]:
    """The scalar head's value at every answer's last token, [N] or [P, K].

    Traceable; 0 for numbers that only fill the batch.
    """
    return jnp.where(batch.mask, values[batch.row, batch.column], 0.0)


def pad_rankings(rankings: Sequence[RankedAnswers], *, length: int, pad_id: int) -> Rankings:
    """One answer to a row of T = `length`; prompts with fewer answers than others get masked ones.

    Raises ValueError when an answer with its prompt is longer than `length`.
    """
    ranks, mask = rank_table(rankings)
    documents = [answer or ((), ()) for answer in _in_table(rankings, ranks.shape[1])]
    return host_batch(Rankings, pad_sequences(documents, length=length, pad_id=pad_id), ranks, mask, doubts(rankings))


def join_rankings(
    rankings: Sequence[RankedAnswers], *, prompt_length: int, answer_length: int, pad_id: int
) -> Rankings:
    """One answer to a row, prompts left-padded to `prompt_length`, answers right after them, T = the sum of both.

    The layout is that of `join(pad_prompts(…), completions)`, so that a batch of ids is the batch of the sampled
    arrays. Prompts with fewer answers than others get masked ones.
    Raises ValueError when a prompt or an answer is longer than its length.
    """
    ranks, mask = rank_table(rankings)
    answers = [answer or ((), ()) for answer in _in_table(rankings, ranks.shape[1])]
    prompts = pad_prompts([prompt for prompt, _ in answers], length=prompt_length, pad_id=pad_id)
    # One more column than the answers have: the last column of a sequence is padding.
    tokens = np.full((len(answers), answer_length + 1), pad_id, np.int32)
    learned = np.zeros(tokens.shape, bool)
    for row, (_, response) in enumerate(answers):
        if len(response) > answer_length:
            raise ValueError(f"answer {row} has {len(response)} tokens, more than the batch's {answer_length}")
        tokens[row, : len(response)] = response
        learned[row, : len(response)] = True
    tokens, real = np.hstack([prompts.tokens, tokens]), np.hstack([prompts.mask, learned])
    learned = np.hstack([np.zeros_like(prompts.mask), learned])
    positions = np.maximum(np.cumsum(real, axis=1, dtype=np.int32) - 1, 0)
    segments = real[:, :-1].astype(np.int32)
    joined = host_batch(Tokens, tokens[:, :-1], tokens[:, 1:], learned[:, 1:], positions[:, :-1], segments)
    return host_batch(Rankings, joined, ranks, mask, doubts(rankings))


def rank_table(
    rankings: Sequence[RankedAnswers], *, prompts: int | None = None, answers: int | None = None
) -> tuple[Int[np.ndarray, "P K"], Bool[np.ndarray, "P K"]]:
    """Ranks of every prompt's answers, and where there is one; P and K as large as needed or told.

    Raises ValueError when there are more prompts or answers than told.
    """
    most = max(len(ranking.ranks) for ranking in rankings)
    shape = (len(rankings) if prompts is None else prompts, most if answers is None else answers)
    if len(rankings) > shape[0] or most > shape[1]:
        raise ValueError(f"{len(rankings)} prompts with up to {most} answers do not fit into {shape[0]} x {shape[1]}")
    ranks, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for p, ranking in enumerate(rankings):
        ranks[p, : len(ranking.ranks)] = ranking.ranks
        mask[p, : len(ranking.ranks)] = True
    return ranks, mask


def doubts(rankings: Sequence[RankedAnswers], count: int | None = None) -> Float[np.ndarray, " P"]:
    """The doubt of each prompt's ranks; 0 for prompts that fill up to `count`."""
    return _filled([ranking.doubt for ranking in rankings], len(rankings) if count is None else count)


def shuffled(rankings: Sequence[RankedAnswers], rng: np.random.Generator) -> Sequence[RankedAnswers]:
    """The same rankings, the answers of each in an order that is drawn once."""
    counts = [len(ranking.ranks) for ranking in rankings]
    ends = np.cumsum(counts)
    orders = np.concatenate([rng.permutation(count).astype(np.uint16) for count in counts])

    def make(row: int) -> RankedAnswers:
        order = orders[ends[row] - counts[row] : ends[row]]
        return reordered(rankings[row], order.tolist())

    return Lazy(len(counts), make)


def reordered(ids: RankedAnswers, order: Sequence[int]) -> RankedAnswers:
    """The same ranking with its answers in another order."""
    return ids._replace(responses=[ids.responses[i] for i in order], ranks=tuple(ids.ranks[i] for i in order))


def clamped(ids: RankedAnswers, most: float) -> RankedAnswers:
    """The same ranking, whose order is right with a probability of at most so much."""
    return ids._replace(doubt=max(ids.doubt, 1.0 - most))


def _filled(numbers: Sequence[float], count: int) -> Float[np.ndarray, " P"]:
    found = np.zeros(count, np.float32)
    found[: len(numbers)] = numbers
    return found


def _in_table(rankings: Sequence[RankedAnswers], most: int) -> list[Answer | None]:
    """Every prompt's answers, and None where it has fewer than `most`."""
    table: list[Answer | None] = []
    for ranking in rankings:
        table += [(ranking.prompt, response) for response in ranking.responses]
        table += [None] * (most - len(ranking.responses))
    return table
