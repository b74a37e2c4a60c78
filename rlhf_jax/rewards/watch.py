"""Signs that a policy exploits its reward. They are watched beside the reward and do not enter it."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.diagnostics import distinct_n, duplicate_share

DIRECTIONS = {"ended": 1, "distinct": 1, "copies": -1, "repetition": -1}
"""Metrics of `answer_metrics` that have a good direction: 1 where more is better, −1 where less is."""
FEWEST = 8
"""Points that a trend needs."""


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


def trend(values: ArrayLike) -> int:
    """Whether a logged series [T] climbs (1), falls (−1) or does neither (0) over its last half.

    The line through it is Theil and Sen's: its slope is the median of the slopes between any two points, which a few
    wild values do not move. It counts as a trend when it rises or falls over the half by more than σ and by more than
    3 σ √(12/T'), the deviation that noise alone gives it: σ is that of the points about the line, from their
    median absolute deviation, and T' the number of points. Values that are not finite are left out; with fewer than
    8 in the half there is no trend. More than 256 points become as many means of neighbours. Noise alone passes for a
    trend in about 8 of 100 series with 8 points in the half, and in 1 of 100 with 50.
    Reference: Sen 1968, "Estimates of the Regression Coefficient Based on Kendall's Tau", JASA 63.
    """
    series = np.asarray(values, np.float64)
    half = series[len(series) // 2 :]
    half = half[np.isfinite(half)]
    if len(half) < FEWEST:
        return 0
    points = np.array([part.mean() for part in np.array_split(half, min(len(half), 256))])
    x = np.arange(len(points))
    i, j = np.triu_indices(len(points), 1)
    slope = np.median((points[j] - points[i]) / (j - i))
    residual = points - slope * x
    sigma = 1.4826 * np.median(np.abs(residual - np.median(residual)))
    rise = slope * (len(points) - 1)
    noise = max(1.0, 3.0 * np.sqrt(12 / len(points))) * sigma
    # Rounding of a constant series is no trend.
    return int(np.sign(rise)) if abs(rise) > max(noise, 1e-9 * np.abs(points).max()) else 0


def climbs_while_falls(reward: ArrayLike, watched: ArrayLike) -> bool:
    """Whether a reward's series climbs while what is watched falls, each by `trend`.

    More of `watched` must be better: give −x for an x of which less is better, such as repetition.
    """
    return trend(reward) == 1 and trend(watched) == -1
