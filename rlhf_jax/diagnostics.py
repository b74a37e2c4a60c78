"""Signs of what goes wrong in RLHF: reward hacking, mode collapse, length bias, a useless critic."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpy.typing import ArrayLike

from rlhf_jax.arrays import check_shapes
from rlhf_jax.batches import Completions
from rlhf_jax.masking import masked_mean


def explained_variance(
    values: Float[Array, "*S"], returns: Float[Array, "*S"], mask: Bool[Array, "*S"]
) -> Float[Array, ""]:
    """1 − Var(returns − values) / Var(returns) over the mask: 1 is perfect, 0 no better than a constant.

    Traceable. 0 where the returns do not vary. Raises ValueError for arrays whose shapes differ.
    """
    check_shapes({"values": values, "returns": returns, "mask": mask})

    def variance(x: Array) -> Array:
        return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)

    total = variance(returns)
    return jnp.where(total > 0, 1.0 - variance(returns - values) / jnp.where(total > 0, total, 1.0), 0.0)


def sampler_gap(completions: Completions, logprobs: Float[Array, "B N"]) -> dict[str, Float[Array, ""]]:
    """How far the sampler's log-probabilities are from the trainer's, in nats a token: mean, 95th percentile, largest.

    Traceable; `logprobs` are the trainer's, of the sampled columns.
    """
    gap = jnp.where(completions.mask, jnp.abs(completions.logprobs - logprobs), jnp.nan)
    return {
        "sampler_gap": jnp.nanmean(gap),
        "sampler_gap_p95": jnp.nanpercentile(gap, 95),
        "sampler_gap_max": jnp.nanmax(gap),
    }


class GaoFit(NamedTuple):
    """R(d) = d (α − β log d)."""

    alpha: float
    beta: float
    r2: float
    """1 − residual / total sum of squares, about the mean; NaN where the rewards do not vary."""

    def __call__(self, kl: ArrayLike) -> Float[np.ndarray, " N"]:
        """The fitted reward at each KL."""
        return _gao_features(kl) @ np.array([self.alpha, self.beta])

    @property
    def peak_kl(self) -> float:
        """Where the fit is highest, d = e^(α/β − 1), as a KL in nats; infinite where it never comes down."""
        # The bound is a distance no policy reaches; beyond it exp overflows.
        if self.beta <= 0 or self.alpha / self.beta > 100:
            return float("inf")
        return float(np.exp(2 * (self.alpha / self.beta - 1)))


def gao_fit(kl: ArrayLike, reward: ArrayLike) -> GaoFit:
    """Fits the gold reward of a policy under RL against its distance from where it started.

        R_RL(d) = d (α_RL − β_RL log d),   d = √KL(π ‖ π_init)

    Linear in α and β, so ordinary least squares. `reward` is measured from the start's: R(0) = 0. A KL that
    an estimate put below 0 counts as 0. Raises ValueError with fewer than 3 finite points at a positive KL.
    Reference: Gao et al. 2023, §3.1, https://arxiv.org/abs/2210.10760.
    """
    return GaoFit(*_least_squares(_gao_features, kl, reward))


class BestOfNFit(NamedTuple):
    """R(d) = d (α − β d)."""

    alpha: float
    beta: float
    r2: float
    """That of `GaoFit`."""

    def __call__(self, kl: ArrayLike) -> Float[np.ndarray, " N"]:
        """The fitted reward at each KL."""
        return _best_of_n_features(kl) @ np.array([self.alpha, self.beta])


def best_of_n_fit(kl: ArrayLike, reward: ArrayLike) -> BestOfNFit:
    """Fits the gold reward of the best of n against its distance, d = √KL, from what is sampled.

        R_bon(d) = d (α_bon − β_bon d)

    In all else it is `gao_fit`. Raises ValueError with fewer than 3 finite points at a positive KL.
    Reference: Gao et al. 2023, eq. 1, https://arxiv.org/abs/2210.10760.
    """
    return BestOfNFit(*_least_squares(_best_of_n_features, kl, reward))


def _best_of_n_features(kl: ArrayLike) -> Float[np.ndarray, "N 2"]:
    squared = np.maximum(np.asarray(kl, np.float64), 0.0)
    return np.stack([np.sqrt(squared), -squared], axis=-1)


def _least_squares(
    features_of: Callable[[ArrayLike], np.ndarray], kl: ArrayLike, reward: ArrayLike
) -> tuple[float, float, float]:
    """(α, β, R²)."""
    points = np.stack([np.asarray(kl, np.float64), np.asarray(reward, np.float64)])
    x, y = points[:, np.isfinite(points).all(axis=0)]
    if np.sum(x > 0) < 3:
        raise ValueError("the fit needs at least 3 finite points at a positive KL")
    features = features_of(x)
    (alpha, beta), *_ = np.linalg.lstsq(features, y, rcond=None)
    residual = np.sum((y - features @ np.array([alpha, beta])) ** 2)
    total = np.sum((y - y.mean()) ** 2)
    return float(alpha), float(beta), float(1 - residual / total) if total > 0 else float("nan")


def distinct_n(texts: Sequence[Sequence], n: int) -> float:
    """Distinct n-grams over all n-grams, of word or token sequences: 1 is varied, near 0 has collapsed.

    0 where no sequence has n items. Reference: Li et al. 2016, §5.1, https://arxiv.org/abs/1510.03055.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def duplicate_share(texts: Sequence[Sequence]) -> float:
    """Share of responses that are an exact copy of an earlier one: 0 when all differ."""
    return 1.0 - len({tuple(text) for text in texts}) / len(texts) if len(texts) else 0.0


class Lengths(NamedTuple):
    """Response lengths, and how far the score is a matter of length."""

    mean: float
    p95: float
    correlation: float
    """Pearson's, of length and score; 0 where either does not vary."""


def length_statistics(lengths: ArrayLike, scores: ArrayLike) -> Lengths:
    """Raises ValueError without responses."""
    x, y = np.asarray(lengths, np.float64), np.asarray(scores, np.float64)
    if not x.size:
        raise ValueError("no responses")
    spread = x.std() * y.std()
    correlation = np.mean((x - x.mean()) * (y - y.mean())) / spread if spread > 0 else 0.0
    return Lengths(float(x.mean()), float(np.percentile(x, 95)), float(correlation))


def collapsed(
    entropy: float,
    start_entropy: float,
    duplicates: float,
    start_duplicates: float,
    *,
    entropy_share: float,
    duplicate_rise: float,
) -> str | None:
    """Why a policy counts as collapsed beside the one it started from, or None.

    It has when its entropy per token fell below `entropy_share` of the start's, or the share of duplicate
    responses *to different prompts* rose by more than `duplicate_rise`. A NaN entropy is a collapse, too.
    """  # fmt: skip
    if not entropy >= entropy_share * start_entropy:
        return f"entropy {entropy:.3g} is below {entropy_share:g} of the start's {start_entropy:.3g}"
    if duplicates - start_duplicates > duplicate_rise:
        return f"{duplicates:.0%} of responses are copies of another, {start_duplicates:.0%} at the start"
    return None


def _gao_features(kl: ArrayLike) -> Float[np.ndarray, "N 2"]:
    d = np.sqrt(np.maximum(np.atleast_1d(np.asarray(kl, np.float64)), 0.0))
    # d log d -> 0 as d -> 0.
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], axis=-1)
