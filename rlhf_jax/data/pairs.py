"""Examples of preference losses: answers in pairs, or single ones that were found good or not.

Everything here is host code. Of a prompt's K ranked answers either the best and the worst make one pair (Yuan et al.
2024, §2, https://arxiv.org/abs/2401.10020; Meng et al. 2024, §3, https://arxiv.org/abs/2405.14734), or every two that
differ in rank do, as in a reward model's loss (Ouyang et al. 2022, §3.5).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.batches import LabelledAnswer, PackedAnswers, RankedAnswers, Tokens
from rlhf_jax.data.lazy import Lazy
from rlhf_jax.data.preferences import Answer, doubts, pack_answers, rank_table
from rlhf_jax.data.tokens import bucket, pad_sequences, size
from rlhf_jax.errors import UserError

Pairs = Literal["best_worst", "all"]


class Examples(NamedTuple):
    """Answers, each once, and the groups that are drawn: pairs (W = 2, chosen one first) or single ones (W = 1)."""

    answers: Sequence[Answer]
    groups: Int[np.ndarray, "M W"]
    """Numbers of answers."""
    good: Bool[np.ndarray, "M W"]
    doubt: Float[np.ndarray, " M"]
    """The chance that a pair's order is wrong."""


class AnswerBatch(NamedTuple):
    """B answers: of pairs the chosen ones, then the rejected ones in the same order."""

    answers: Tokens | PackedAnswers
    good: Bool[Array, " B"]
    lengths: Int[Array, " B"]
    """Tokens of each response."""
    ref_logprobs: Float[Array, " B"]
    doubt: Float[Array, " B"]
    """The chance that the order of an answer's pair is wrong."""
    mismatched: Tokens | PackedAnswers | None = None
    """The same responses after other prompts (KTO)."""
    ref_mismatched: Float[Array, " B"] | None = None


def paired(rankings: Sequence[RankedAnswers], pairs: Pairs) -> Examples:
    """Pairs of each prompt's answers; equal ranks form none. Answers are in the order of the rankings."""
    find = best_and_worst if pairs == "best_worst" else all_pairs
    ranks, mask = rank_table(rankings)
    found = find(ranks, mask)
    used, groups = np.unique(found, return_inverse=True)
    prompts, places = np.divmod(used.astype(np.int32), ranks.shape[1])

    def answer(number: int) -> Answer:
        ranking = rankings[prompts[number]]
        return ranking.prompt, ranking.responses[places[number]]

    groups = groups.reshape(-1, 2)
    doubt = doubts(rankings)[found[:, 0] // ranks.shape[1]]
    return Examples(Lazy(len(places), answer), groups, np.broadcast_to([True, False], groups.shape), doubt)


def singly(examples: Examples) -> Examples:
    """Pairs taken apart: every chosen answer is a good one, every rejected one a bad one."""
    each = examples.groups.shape[1]
    return Examples(
        examples.answers, examples.groups.reshape(-1, 1), examples.good.reshape(-1, 1), examples.doubt.repeat(each)
    )


def labelled(rows: Sequence[LabelledAnswer]) -> Examples:
    """Single answers with the labels that they came with."""

    def answer(number: int) -> Answer:
        row = rows[number]
        return row.prompt, row.response

    good = np.fromiter((row.good for row in rows), bool, len(rows))[:, None]
    return Examples(Lazy(len(rows), answer), np.arange(len(rows))[:, None], good, np.zeros(len(rows), np.float32))


def best_and_worst(ranks: Int[np.ndarray, "P K"], mask: Bool[np.ndarray, "P K"]) -> Int[np.ndarray, "M 2"]:
    """Numbers p·K + k of the best and of the worst answer to each prompt; the first of several."""
    k, start = ranks.shape[1], np.arange(len(ranks))
    best = np.where(mask, ranks, np.iinfo(ranks.dtype).max).argmin(axis=1)
    worst = np.where(mask, ranks, -1).argmax(axis=1)
    differ = ranks[start, best] < ranks[start, worst]
    return np.stack([start * k + best, start * k + worst], axis=1)[differ]


def all_pairs(ranks: Int[np.ndarray, "P K"], mask: Bool[np.ndarray, "P K"]) -> Int[np.ndarray, "M 2"]:
    """Numbers p·K + k of every two answers to a prompt that differ in rank."""
    both = mask[:, :, None] & mask[:, None, :]
    p, better, worse = np.nonzero(both & (ranks[:, :, None] < ranks[:, None, :]))
    return np.stack([p, p], axis=1) * ranks.shape[1] + np.stack([better, worse], axis=1)


def mismatch(answers: Sequence[Answer], *, longest: int, seed: int) -> Sequence[Answer]:
    """Every response after the prompt of another one: prompts in a random circle, each gives way to the next.

    Where prompt and response would be longer than `longest` tokens, the prompt loses its first ones. These sequences
    only estimate a KL, nothing is learned from them. Raises UserError for a single prompt.
    """
    prompts = sorted({tuple(prompt) for prompt, _ in answers})
    if len(prompts) < 2:
        raise UserError("KTO needs answers to at least two prompts: it sets answers beside those to other prompts")
    order = np.random.default_rng([seed, 5]).permutation(len(prompts))
    following = {prompts[i]: prompts[j] for i, j in zip(order, np.roll(order, -1), strict=True)}

    def answer(number: int) -> Answer:
        prompt, response = answers[number]
        other = list(following[tuple(prompt)])
        return other[max(0, len(other) + len(response) - longest) :], response

    return Lazy(len(answers), answer)


def width(answers: Sequence[Answer], longest: int) -> int:
    """The bucket of the longest answer with its prompt, at most `longest` tokens."""
    return bucket(max(map(size, answers)), longest=longest)


def lay_out(answers: Sequence[Answer], *, length: int, pad_id: int, packed: bool) -> Tokens | PackedAnswers:
    """Answers one to a row of T = `length`, or several. Raises ValueError when one is longer with its prompt."""
    if packed:
        return pack_answers(answers, length=length, pad_id=pad_id)
    return pad_sequences(answers, length=length, pad_id=pad_id)
