"""The data that the parts hand to each other: NamedTuples of arrays, batch first. Comparisons are token ids at first.

The shift happens once, in `data/`: index t is about emitting `targets[:, t]` after reading `inputs[:, :t+1]`.
Every sequence ends in at least one padding column, so its last token is always found in `inputs` too: the
input at (last True of `mask`) + 1, which is where a reward model reads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Tokens(NamedTuple):
    """Token sequences, shifted: `targets[:, t]` follows `inputs[:, t]`."""

    inputs: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    """True where `targets` is part of a response (its EOS included)."""
    positions: Int[Array, "B T"]
    """Position of each input in its document, from 0."""
    segment_ids: Int[Array, "B T"]
    """Document of each input, from 1; 0 is padding. Attention stays inside a document."""


class RankedAnswers(NamedTuple):
    """A prompt and its answers as token ids, each answer with its EOS: what a comparison is until a batch is made."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    ranks: tuple[int, ...]
    """One for each response; 0 is best, equal ranks form no pair."""
    margin: float = 0.0
    """How much better the best answer was found, where people said so."""
    doubt: float = 0.0
    """The chance that the order of two answers is wrong, at most ½: 1 − p where the label has a probability p."""


class LabelledAnswer(NamedTuple):
    """Token ids of a prompt and of one answer, which was found good or not (KTO)."""

    prompt: Sequence[int]
    response: Sequence[int]
    good: bool


class Rankings(NamedTuple):
    """K responses to each of P prompts, prompt-major: row p·K + k of `responses` is response k of prompt p."""

    responses: Tokens
    ranks: Int[Array, "P K"]
    """0 is best; equal ranks form no pair."""
    mask: Bool[Array, "P K"]
    """False where a prompt has fewer than K responses."""
    doubt: Float[Array, " P"]
    """The chance that the order of two responses is wrong."""


class PackedAnswers(NamedTuple):
    """N answers, several to a row: each a document that repeats its prompt. An answer's number is its place in N."""

    tokens: Tokens
    owner: Int[Array, "B T"]
    """Number of the answer that a target belongs to; N where it belongs to none."""
    row: Int[Array, " N"]
    column: Int[Array, " N"]
    """Where the answer's last token is in `tokens.inputs`: a reward model reads there."""
    mask: Bool[Array, " N"]
    """False for numbers that only fill the batch."""


class PackedRankings(NamedTuple):
    """`PackedAnswers` of K answers to each of P prompts: answer k of prompt p has the number p·K + k."""

    tokens: Tokens
    owner: Int[Array, "B T"]
    row: Int[Array, "P K"]
    column: Int[Array, "P K"]
    mask: Bool[Array, "P K"]
    """False where a prompt has fewer than K answers, and for prompts that only fill the batch."""
    ranks: Int[Array, "P K"]
    """0 is best; equal ranks form no pair."""
    margin: Float[Array, " P"]
    doubt: Float[Array, " P"]
    """The chance that the order of two answers is wrong."""


class Prompts(NamedTuple):
    """Left-padded prompts, for rollouts."""

    tokens: Int[Array, "B P"]
    mask: Bool[Array, "B P"]
    row: Int[Array, " B"]
    """Where the prompt came from: the row's number in its source."""


class Completions(NamedTuple):
    """Sampled answers to `Prompts`: N columns, the first right after the prompt."""

    tokens: Int[Array, "B N"]
    mask: Bool[Array, "B N"]
    """True for every sampled token, the EOS included."""
    logprobs: Float[Array, "B N"]
    """Log-probability of each token under the distribution it was sampled from."""


class Ended(NamedTuple):
    """Answers that have ended while others of their batch have not, as numpy arrays."""

    rows: Int[np.ndarray, " N"]
    """Their numbers in the batch."""
    tokens: Int[np.ndarray, "N T"]
    mask: Bool[np.ndarray, "N T"]


class Experience(NamedTuple):
    """The sampled answers that PPO learns from. Each array is [B, T] and aligned with `tokens.targets`."""

    tokens: Tokens
    old_logprobs: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"]
    old_values: Float[Array, "B T"]
    rewards: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]
