"""Signs that a policy exploits its reward. They are watched beside the reward and do not enter it."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.diagnostics import distinct_n, duplicate_share

DIRECTIONS = {"ended": 1, "distinct": 1, "copies": -1, "repetition": -1}
"""Metrics of `answer_metrics` that have a good direction: 1 where more is better, −1 where less is."""


def answer_metrics(
    prompts: Sequence[Hashable], answers: Sequence[Sequence[Hashable]], ended: ArrayLike, *, n: int = 3
) -> dict[str, float]:
    """Metrics of sampled answers that do not depend on any reward.

    length: mean number of items (tokens, of answers that are ids). ended: share that ended by itself, from `ended`
    [N]. distinct: different answers over all. copies: share of copies of an answer to another prompt; the same answer
    to the same prompt counts once. repetition: `repetition` with n-grams of `n`.
    Raises ValueError without answers, or when the three are not of one length.
    """
    given = [tuple(answer) for answer in answers]
    if not given:
        raise ValueError("no answers")
    stopped = np.asarray(ended, bool)
    if stopped.shape != (len(given),):
        raise ValueError(f"ended has the shape {stopped.shape} for {len(given)} answers")
    different = set(zip(prompts, given, strict=True))
    return {
        "length": float(np.mean([len(answer) for answer in given])),
        "ended": float(stopped.mean()),
        "distinct": 1.0 - duplicate_share(given),
        "copies": duplicate_share([answer for _, answer in different]),
        "repetition": repetition(given, n),
    }


def answer_statistics(prompts: Prompts, completions: Completions) -> dict[str, float]:
    """The shares of distinct answers and of copies, and the repetition, of sampled token ids (numpy arrays)."""
    ids = [row[real].tolist() for row, real in zip(completions.tokens, completions.mask, strict=True)]
    found = answer_metrics(np.asarray(prompts.row).tolist(), ids, np.ones(len(ids), bool))
    return {name: found[name] for name in ("distinct", "copies", "repetition")}


def repetition(answers: Sequence[Sequence[Hashable]], n: int) -> float:
    """Share of an answer's n-grams that it has said before, mean over the answers; 0 for one shorter than `n`."""
    return float(np.mean([1.0 - distinct_n([answer], n) if len(answer) >= n else 0.0 for answer in answers]))
