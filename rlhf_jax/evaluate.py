"""How good a reward model or a policy is, each rate with an interval. Host code on numpy arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from rlhf_jax.batches import Rankings

Z95 = 1.959963984540054


class Rate(NamedTuple):
    """A share and its 95% interval."""

    rate: float
    low: float
    high: float


def wilson_interval(successes: float | int, trials: int) -> Rate:
    """The 95% score interval of a binomial proportion, with z = 1.96:

        (p̂ + z²/2n ± z √(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n)

    It stays inside [0, 1] and has a width also at p̂ = 0 and 1. Halves are allowed (a tie is half a success).
    Raises ValueError without trials.
    Reference: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    if trials <= 0:
        raise ValueError("a rate needs at least one trial")
    p, z2 = successes / trials, Z95**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * np.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # It contains p̂, also where rounding would have it otherwise (at 0 and 1).
    return Rate(float(p), min(p, max(0.0, float(centre - half))), max(p, min(1.0, float(centre + half))))


def win_rate(a: ArrayLike, b: ArrayLike) -> Rate:
    """Share of rows where a > b, ties counting half, with its Wilson interval. Raises ValueError on NaN."""
    ours, theirs = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"the two sides have shapes {ours.shape} and {theirs.shape}")
    if np.isnan(ours).any() or np.isnan(theirs).any():
        raise ValueError("NaN is neither a win nor a loss")
    return wilson_interval(float(np.sum(ours > theirs) + 0.5 * np.sum(ours == theirs)), ours.size)


def preference_accuracy(chosen_rewards: ArrayLike, rejected_rewards: ArrayLike) -> Rate:
    """Share of pairs whose chosen response has the higher reward, ties counting half."""
    return win_rate(chosen_rewards, rejected_rewards)


def length_baseline(chosen_lengths: ArrayLike, rejected_lengths: ArrayLike) -> Rate:
    """The rate that "pick the longer" would reach: a reward model that is no better has learned length."""
    return win_rate(chosen_lengths, rejected_lengths)


class JudgedWinRate(NamedTuple):
    """A win rate by a judge who saw each pair in both orders."""

    win: Rate
    """A win in both orders counts 1, a loss in both 0, anything else ½."""
    consistent: Rate
    """Share of pairs judged alike in both orders."""
    first_shown: Rate
    """Share of verdicts for the response shown first: ½ when the place makes no difference, a tie being ½."""


def judged_win_rate(shown_first: ArrayLike, shown_second: ArrayLike) -> JudgedWinRate:
    """Win rate of our responses, from how far they were preferred (1 to 0) when shown first and shown second.

    A preference above ½ is a win. Raises ValueError on NaN, without pairs, or for sides of different lengths.
    Reference: Zheng et al. 2023, §3.4, https://arxiv.org/abs/2306.05685.
    """
    first, second = np.asarray(shown_first, np.float64), np.asarray(shown_second, np.float64)
    win_rate(first, second)  # which checks both sides
    ahead, ahead_second = np.sign(first - 0.5), np.sign(second - 0.5)
    same = ahead == ahead_second
    for_first = (2 + ahead - ahead_second) / 4
    return JudgedWinRate(
        win=wilson_interval(float(np.sum(np.where(same, (1 + ahead) / 2, 0.5))), first.size),
        consistent=wilson_interval(int(same.sum()), first.size),
        first_shown=wilson_interval(float(for_first.sum()), first.size),
    )


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood a token, and a 95% interval over documents."""

    perplexity: float
    low: float
    high: float
    """The interval is NaN for a single document."""
    tokens: int


def perplexity(logprobs: ArrayLike, tokens: ArrayLike) -> Perplexity:
    """Perplexity of documents, from the sum of log-probabilities and the number of tokens of each, [N] both.

        PPL = exp(−Σ_d ℓ_d / Σ_d n_d)

    Every token counts alike. The interval is exp(log PPL ± 1.96 s), s² = N/(N−1) Σ_d (ℓ_d + n_d log PPL)² / (Σ n_d)²,
    the variance of a ratio: tokens of one document are not independent. Raises ValueError without tokens.
    """
    sums, counts = np.asarray(logprobs, np.float64), np.asarray(tokens, np.float64)
    if sums.shape != counts.shape or sums.ndim != 1:
        raise ValueError(f"one log-probability and one count a document, not {sums.shape} and {counts.shape}")
    total = counts.sum()
    if not total > 0:
        raise ValueError("perplexity needs at least one token")
    mean, documents = -sums.sum() / total, len(sums)
    error = np.nan
    if documents > 1:
        error = Z95 * np.sqrt(documents / (documents - 1) * np.sum((sums + counts * mean) ** 2)) / total
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(x)) for x in (mean, mean - error, mean + error))
    return Perplexity(value, low, high, int(total))


class Calibration(NamedTuple):
    """A reliability table, one row a bin that is not empty, and its expected calibration error."""

    predicted: Float[np.ndarray, " N"]
    """Mean predicted probability."""
    observed: Float[np.ndarray, " N"]
    """Share of outcomes that came true."""
    counts: Float[np.ndarray, " N"]
    error: float
    """Σ (count / total) · |observed − predicted|."""


def calibration(margins: ArrayLike, outcomes: ArrayLike, *, bins: int) -> Calibration:
    """Compares σ(margin), what Bradley-Terry predicts, with how often it was so, in bins of equal width.

    `margins` are reward differences of the first response over the second, `outcomes` whether it won.
    If margins are always taken as chosen − rejected, every outcome is true and the table says nothing: turn a
    half of the pairs round. Raises ValueError without pairs.
    Reference: Guo et al. 2017, eq. 3, https://arxiv.org/abs/1706.04599.
    """
    logits, came_true = np.asarray(margins, np.float64), np.asarray(outcomes, np.float64)
    if not logits.size:
        raise ValueError("calibration needs at least one pair")
    predicted = 0.5 * (1 + np.tanh(logits / 2))  # σ without overflow
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    counts = np.bincount(index, minlength=bins).astype(np.float64)
    used = counts > 0
    mean_predicted = np.bincount(index, predicted, bins)[used] / counts[used]
    mean_observed = np.bincount(index, came_true, bins)[used] / counts[used]
    error = np.sum(counts[used] / logits.size * np.abs(mean_observed - mean_predicted))
    return Calibration(mean_predicted, mean_observed, counts[used], float(error))


def margin_calibration(margins: ArrayLike, *, bins: int) -> Calibration:
    """`calibration` of rewards chosen − rejected, [N]. Every second pair is turned round, for outcomes of both kinds.

    Raises ValueError without pairs.
    """
    signs = np.where(np.arange(np.size(margins)) % 2, -1.0, 1.0)
    return calibration(signs * np.asarray(margins), signs > 0, bins=bins)


def agreement(scores: Float[np.ndarray, " N"], heldout: Rankings) -> dict[str, Any]:
    """How well scores of all held-out answers, row by row, predict which of two answers people prefer.

    The rate with its interval, "pick the longer" beside it, and the calibration error.
    """
    scores = scores.reshape(heldout.ranks.shape)
    lengths = np.asarray(heldout.responses.mask).sum(axis=1).reshape(heldout.ranks.shape)
    rows = np.arange(len(scores))
    best, worst = heldout.ranks.argmin(axis=1), heldout.ranks.argmax(axis=1)
    accuracy, low, high = preference_accuracy(scores[rows, best], scores[rows, worst])
    margins = scores[rows, best] - scores[rows, worst]
    return {
        "val_accuracy": accuracy,
        "val_accuracy_low": low,
        "val_accuracy_high": high,
        "length_baseline": length_baseline(lengths[rows, best], lengths[rows, worst])[0],
        "calibration_error": margin_calibration(margins, bins=10).error,
    }


def rate_metrics(name: str, rate: Sequence[float], n: int) -> dict[str, float]:
    """A rate (or another number) with its interval, and of how many: name, name_low, name_high and name_n."""
    return {name: rate[0], f"{name}_low": rate[1], f"{name}_high": rate[2], f"{name}_n": n}


def share_metrics(name: str, hits: Sequence[bool] | Bool[np.ndarray, " N"]) -> dict[str, float]:
    """`rate_metrics` of how many of N are true. Raises ValueError without any."""
    return rate_metrics(name, wilson_interval(int(sum(hits)), len(hits)), len(hits))


def pair_metrics(
    name: str,
    chosen: Float[np.ndarray, " N"],
    rejected: Float[np.ndarray, " N"],
    lengths: Int[np.ndarray, "2 N"],
    subsets: Sequence[str],
) -> dict[str, float]:
    """How often the chosen response scores higher, and "pick the longer" beside it: of all pairs, and by subset.

    Names are <name>_accuracy and <name>_length_baseline, and where there are several subsets <name>/<subset>_…, too.
    """
    labels = np.array(subsets)
    metrics: dict[str, float] = {}
    parts = {name: np.full(len(labels), True)}
    if len(set(subsets)) > 1:
        parts |= {f"{name}/{subset}": labels == subset for subset in sorted(set(subsets))}
    for part, rows in parts.items():
        n = int(rows.sum())
        metrics |= rate_metrics(f"{part}_accuracy", preference_accuracy(chosen[rows], rejected[rows]), n)
        metrics |= rate_metrics(f"{part}_length_baseline", length_baseline(*lengths[:, rows]), n)
    return metrics


def rate_lines(metrics: Mapping[str, float]) -> list[str]:
    """Metrics as lines for people: first those of `rate_metrics`, with their intervals, then the others.

    Perplexities and utilities are shown as numbers, all else that has an interval as a percentage.
    """
    lines = []
    for name in (key.removesuffix("_n") for key in metrics if key.endswith("_n")):
        value, low, high = (metrics[name + end] for end in ("", "_low", "_high"))
        share = name.startswith("win_rate") or not name.endswith(("perplexity", "utility"))
        shown = "{:8.1%}  ({:.1%} to {:.1%})" if share else "{:8.2f}  ({:.2f} to {:.2f})"
        lines.append(f"{name:<44}{shown.format(value, low, high):<30}  n = {metrics[f'{name}_n']}")
    plain = [key for key in metrics if not key.endswith(("_n", "_low", "_high")) and f"{key}_n" not in metrics]
    return lines + [f"{name:<44}{metrics[name]:8.3f}" for name in plain]
