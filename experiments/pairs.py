"""What preference losses learn from: answers in pairs, or single ones that were found good or not.

Everything here is host code. Of a prompt's K ranked answers either the best and the worst make one pair (Yuan et al.
2024, §2, https://arxiv.org/abs/2401.10020; Meng et al. 2024, §3, https://arxiv.org/abs/2405.14734), or every two that
differ in rank do, as in a reward model's loss (Ouyang et al. 2022, §3.5).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.batches import PackedRankings, Rankings, Tokens
from rlhf_jax.data.encode import EncodedRanking
from rlhf_jax.data.preferences import pack_rankings
from rlhf_jax.data.tokens import bucket, pad_sequences, size
from rlhf_jax.errors import UserError

Pairs = Literal["best_worst", "all"]
Answer = tuple[list[int], list[int]]
"""Ids of a prompt and of a response to it."""


class Examples(NamedTuple):
    """Answers, each once, and the groups that are drawn: pairs (W = 2, chosen one first) or single ones (W = 1)."""

    answers: list[Answer]
    groups: Int[np.ndarray, "M W"]
    """Numbers of answers."""
    good: Bool[np.ndarray, "M W"]


class Batch(NamedTuple):
    """B answers: of pairs the chosen ones, then the rejected ones in the same order."""

    answers: Tokens | PackedRankings
    good: Bool[Array, " B"]
    lengths: Int[Array, " B"]
    """Tokens of each response."""
    ref_logprobs: Float[Array, " B"]
    mismatched: Tokens | PackedRankings | None = None
    """The same responses after other prompts (KTO)."""
    ref_mismatched: Float[Array, " B"] | None = None


def paired(rankings: Rankings, pairs: Pairs) -> Examples:
    """Pairs of a prompt's answers; equal ranks form none."""
    find = best_and_worst if pairs == "best_worst" else all_pairs
    rows, groups = np.unique(find(np.asarray(rankings.ranks), np.asarray(rankings.mask)), return_inverse=True)
    groups = groups.reshape(-1, 2)
    return Examples(unjoin(rankings.responses, rows), groups, np.broadcast_to([True, False], groups.shape))


def singly(examples: Examples) -> Examples:
    """Pairs taken apart: every chosen answer is a good one, every rejected one a bad one."""
    return examples._replace(groups=examples.groups.reshape(-1, 1), good=examples.good.reshape(-1, 1))


def best_and_worst(ranks: Int[np.ndarray, "P K"], mask: Bool[np.ndarray, "P K"]) -> Int[np.ndarray, "M 2"]:
    """Rows p·K + k of the best and of the worst answer to each prompt; the first of several."""
    k, start = ranks.shape[1], np.arange(len(ranks))
    best = np.where(mask, ranks, np.iinfo(ranks.dtype).max).argmin(axis=1)
    worst = np.where(mask, ranks, -1).argmax(axis=1)
    differ = ranks[start, best] < ranks[start, worst]
    return np.stack([start * k + best, start * k + worst], axis=1)[differ]


def all_pairs(ranks: Int[np.ndarray, "P K"], mask: Bool[np.ndarray, "P K"]) -> Int[np.ndarray, "M 2"]:
    """Rows p·K + k of every two answers to a prompt that differ in rank."""
    both = mask[:, :, None] & mask[:, None, :]
    p, better, worse = np.nonzero(both & (ranks[:, :, None] < ranks[:, None, :]))
    return np.stack([p, p], axis=1) * ranks.shape[1] + np.stack([better, worse], axis=1)


def unjoin(tokens: Tokens, rows: Int[np.ndarray, " N"]) -> list[Answer]:
    """(prompt, response) of rows that hold one document each, which ends in its response."""
    answers = []
    for row in rows:
        ids = np.asarray(tokens.inputs[row])[np.asarray(tokens.segment_ids[row]) > 0].tolist()
        start = len(ids) - int(np.asarray(tokens.mask[row]).sum())
        answers.append((ids[:start], ids[start:]))
    return answers


def mismatch(answers: Sequence[Answer], *, longest: int, seed: int) -> list[Answer]:
    """Every response after the prompt of another one: prompts in a random circle, each gives way to the next.

    What would be longer than `longest` loses the beginning of its prompt. Raises UserError for a single prompt.
    """
    prompts = sorted({tuple(prompt) for prompt, _ in answers})
    if len(prompts) < 2:
        raise UserError("KTO needs answers to at least two prompts: it sets answers beside those to other prompts")
    order = np.random.default_rng([seed, 5]).permutation(len(prompts))
    following = {prompts[i]: prompts[j] for i, j in zip(order, np.roll(order, -1), strict=True)}
    found = []
    for prompt, response in answers:
        other = list(following[tuple(prompt)])
        found.append((other[max(0, len(other) + len(response) - longest) :], response))
    return found


def width(answers: Sequence[Answer], longest: int) -> int:
    """The bucket of the longest."""
    return bucket(max(map(size, answers)), longest=longest)


def lay_out(answers: Sequence[Answer], *, length: int, pad_id: int, packed: bool) -> Tokens | PackedRankings:
    """One answer to a row of T = `length`, or several."""
    if not packed:
        return pad_sequences(answers, length=length, pad_id=pad_id)
    alone = [EncodedRanking(prompt, [response], (0,), 0.0) for prompt, response in answers]
    return pack_rankings(alone, length=length, pad_id=pad_id)
