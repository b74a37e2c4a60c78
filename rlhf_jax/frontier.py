"""The best that a policy can do at each distance from the reference, from a pool of the reference's own answers.

The policy that maximises E[r] − β·KL(π‖π_ref) is π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x) (Korbak et al. 2022,
https://arxiv.org/abs/2205.11275; Rafailov et al. 2023, eq. 4, https://arxiv.org/abs/2305.18290). Answers of π_ref that
are weighted by exp(r/β) are a sample of it, good as long as many of them have weight.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


class Optimum(NamedTuple):
    """The best policy for a reward at one β, told from a pool."""

    beta: float
    kl: float
    """KL(π*‖π_ref), nats a response, mean over prompts."""
    score: float
    """Its mean reward."""
    value: float
    """Its mean true utility; NaN where none is given."""
    effective: float
    """Kish's effective sample size, 1/Σw²: nine of ten prompts have more."""


def optimal_weights(scores: ArrayLike, beta: float) -> Float[np.ndarray, "P N"]:
    """The weights of a pool's answers under π*: softmax of r/β over the N answers to each of P prompts.

    Raises ValueError unless β is positive.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}; the optimum is known for a positive one")
    logits = np.asarray(scores, np.float64) / beta
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def optimum(scores: ArrayLike, beta: float, values: ArrayLike | None = None) -> Optimum:
    """The best policy at β for the reward `scores` [P, N] of N answers of π_ref to each of P prompts.

        E[r] = Σᵢ wᵢ rᵢ        KL = log N + Σᵢ wᵢ log wᵢ

    Both are of self-normalised weights. Where few answers have weight both come out too low: KL is at most log N.
    `values` [P, N] are the answers' true utility. Raises ValueError unless β is positive and shapes agree.
    """
    weights, given = optimal_weights(scores, beta), np.asarray(scores, np.float64)
    worth = np.full_like(given, np.nan) if values is None else np.asarray(values, np.float64)
    if worth.shape != given.shape:
        raise ValueError(f"values of shape {worth.shape} do not belong to scores of shape {given.shape}")
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    kl = np.log(weights.shape[1]) + (weights * logs).sum(axis=1)
    effective = 1 / (weights**2).sum(axis=1)
    score, value = ((weights * some).sum(axis=1).mean() for some in (given, worth))
    return Optimum(beta, float(kl.mean()), float(score), float(value), float(np.quantile(effective, 0.1)))


def frontier(
    scores: ArrayLike, betas: Sequence[float], values: ArrayLike | None = None, *, least: float
) -> list[Optimum]:
    """The optimum at each β, the largest first; cut off where the effective sample size falls below `least`."""
    found = (optimum(scores, beta, values) for beta in sorted(betas, reverse=True))
    return [one for one in found if one.effective >= least]
