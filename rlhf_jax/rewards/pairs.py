"""Scores of pairs of answers in text, of which one is known to be better."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.data.encode import encode, shortened
from rlhf_jax.data.formats import Comparison
from rlhf_jax.data.rejects import BadRow
from rlhf_jax.data.suites import Reasons, tally
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase
from rlhf_jax.data.tokens import Document
from rlhf_jax.errors import UserError


class PairScores(NamedTuple):
    """The N pairs that fitted."""

    chosen: Float[np.ndarray, " N"]
    rejected: Float[np.ndarray, " N"]
    lengths: Int[np.ndarray, "2 N"]
    """Tokens of the chosen, then of the rejected responses."""
    kept: list[int]
    """Which of the pairs given these are."""
    notes: list[str]
    """How many pairs did not fit, and how many prompts lost turns."""


def score_pairs(
    score: Callable[[Sequence[Document]], np.ndarray],
    name: str,
    pairs: Sequence[Comparison],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
) -> PairScores:
    """Scores by score(documents) -> a number for each, of both answers of each pair, encoded as in training.

    A conversation that is longer than `max_length` tokens loses its oldest turns. A pair that does not fit even so is
    left out.
    Raises UserError when no pair of the set, which is called `name`, fits.
    """
    documents: tuple[list[Document], list[Document]] = ([], [])
    kept: list[int] = []
    reasons: Reasons = {}
    for number, pair in enumerate(pairs):
        try:
            found, dropped = encode(pair, tokenizer, max_length)
        except BadRow as error:
            reasons.setdefault(str(error), []).append(pair.place.line)
            continue
        if dropped:
            reasons.setdefault(shortened(max_length), []).append(pair.place.line)
        for side, pick in zip(documents, (min, max), strict=True):
            side.append((found.prompt, found.responses[found.ranks.index(pick(found.ranks))]))
        kept.append(number)
    if not kept:
        raise UserError(f"{name}: no pair fits: {', '.join(reasons)}; raise --max-length")
    both = documents[0] + documents[1]
    lengths = np.array([len(response) for _, response in both]).reshape(2, -1)
    chosen, rejected = score(both).reshape(2, -1)
    return PairScores(chosen, rejected, lengths, kept, tally(name, reasons))
