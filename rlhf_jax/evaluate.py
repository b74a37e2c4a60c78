"""How good a reward model or a policy is, each rate with an interval. Host code on numpy arrays."""

import math
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


def wilson_interval(successes: float | int, trials: float | int) -> Rate:
    """The 95% score interval of a binomial proportion, with z = 1.96:

        (p̂ + z²/2n ± z √(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n)

    It stays inside [0, 1] and has a width also at p̂ = 0 and 1. Trials are independent and succeed or fail: for ties
    there is `trinomial_interval`, for several trials of one prompt `clustered_rate`.
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


def trinomial_interval(wins: int, ties: int, losses: int) -> Rate:
    """Rate of wins, a tie being half of one, with its 95% score interval.

    The difference δ = P(win) − P(loss) is in the interval as long as it is not rejected:

        |w − l − nδ| / √(n (P(win) + P(loss) − δ²)) <= 1.96,   P the most likely ones with that δ

    A tie has less variance than half a win: Wilson's interval, which it is without ties, would be too wide.
    Raises ValueError without trials.
    Reference: Tango 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B.
    """
    n = wins + ties + losses
    if n <= 0:
        raise ValueError("a rate needs at least one trial")

    def rejected(delta: float) -> bool:
        b = -wins - losses + (2 * n - wins + losses) * delta
        root = math.sqrt(max(0.0, b * b + 8 * n * losses * delta * (1 - delta)))
        variance = 2 * (root - b) / (4 * n) + delta * (1 - delta)
        return (wins - losses - n * delta) ** 2 > Z95**2 * n * max(variance, 0.0)

    found = (wins - losses) / n

    def edge(end: float) -> float:
        inside, outside = found, end
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    return Rate((1 + found) / 2, (1 + edge(-1.0)) / 2, (1 + edge(1.0)) / 2)


def clustered_rate(hits: ArrayLike, counts: ArrayLike) -> Rate:
    """Σ hits / Σ counts of N clusters of trials, [N] both, with a 95% interval: those of one cluster may be alike.

    It is Wilson's interval for as many independent trials as would have the variance of a ratio,
    s² = N/(N−1) Σ_d (h_d − p c_d)² / (Σ c)², at most Σ c of them, corrected for the N − 1 degrees of freedom of s.
    Where all succeed or all fail, a cluster counts as one trial. Raises ValueError without trials.
    Reference: Korn & Graubard 1998, "Confidence intervals for proportions with small expected number of positive
    counts estimated from survey data", Survey Methodology 24; Dean & Pagano 2015,
    https://doi.org/10.1093/jssam/smv024, find it to cover well.
    """
    found, sizes = np.asarray(hits, np.float64), np.asarray(counts, np.float64)
    found, sizes = found[sizes > 0], sizes[sizes > 0]
    total, clusters = sizes.sum(), len(sizes)
    if not clusters:
        raise ValueError("a rate needs at least one trial")
    p = found.sum() / total
    if (sizes == 1).all() and np.isin(found, (0, 1)).all():
        return wilson_interval(found.sum(), clusters)
    trials = float(clusters)
    if clusters > 1 and 0 < p < 1:
        from scipy.special import stdtrit

        variance = clusters / (clusters - 1) * np.sum((found - p * sizes) ** 2) / total**2
        trials = total if variance == 0 else min(total, p * (1 - p) / variance)
        trials *= (Z95 / stdtrit(clusters - 1, 0.975)) ** 2
    return wilson_interval(p * trials, trials)


def win_rate(a: ArrayLike, b: ArrayLike) -> Rate:
    """Share of rows where a > b, ties counting half, with its `trinomial_interval`. Raises ValueError on NaN."""
    ours, theirs = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"the two sides have shapes {ours.shape} and {theirs.shape}")
    if np.isnan(ours).any() or np.isnan(theirs).any():
        raise ValueError("NaN is neither a win nor a loss")
    return trinomial_interval(int(np.sum(ours > theirs)), int(np.sum(ours == theirs)), int(np.sum(ours < theirs)))


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
        win=win_rate(np.where(same, ahead, 0.0), np.zeros_like(ahead)),
        consistent=wilson_interval(int(same.sum()), first.size),
        first_shown=clustered_rate(2 * for_first, np.full(first.size, 2)),
    )


def pass_at_k(right: ArrayLike, samples: int, k: int) -> Float[np.ndarray, " P"]:
    """The chance that one of k samples is right, for each of P problems of which `right` [P] of `samples` were.

        1 − C(n − c, k) / C(n, k)

    Unbiased, where 1 − (1 − c/n)ᵏ is too low. Raises ValueError when there are fewer than k samples, or more right
    ones than samples.
    Reference: Chen et al. 2021, eq. 1, https://arxiv.org/abs/2107.03374.
    """
    found = np.asarray(right, np.float64)
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be told from {samples} samples")
    if ((found < 0) | (found > samples)).any():
        raise ValueError(f"there are more right samples than {samples}, or fewer than none")
    # Π over the k draws: the share of wrong ones among those that are left.
    drawn = np.arange(k)
    return 1.0 - np.prod(np.maximum(samples - found[:, None] - drawn, 0.0) / (samples - drawn), axis=1)


def best_of_n_kl(n: Any) -> Any:
    """An upper bound of KL(best of n ‖ policy) in nats a response: log n − (n − 1)/n. It is exact without ties.

    For a number n, or an array of them.

    Reference: Stiennon et al. 2020, appendix G.3, https://arxiv.org/abs/2009.01325; that it is a bound, Beirami et al.
    2024, https://arxiv.org/abs/2401.01879.
    """
    count = np.asarray(n, np.float64)
    return np.log(count) - (count - 1) / count


def best_of_n_mean(scores: ArrayLike, n: int, values: ArrayLike | None = None) -> Float[np.ndarray, " P"]:
    """The mean score of the best of n, for each of P prompts, from a pool of N samples of each: scores [P, N].

        Σ_i C(i − 1, n − 1) / C(N, n) · r_(i),   r_(i) the i-th smallest

    It is the mean over all C(N, n) subsets of the pool, so unbiased. With `values` [P, N] it is the mean value of the
    answer that scores best, such as its true utility; of answers that score alike each is as likely to be taken.
    Raises ValueError when the pool has fewer than n, or there are not as many values as scores.
    Reference: Nakano et al. 2021 (WebGPT), appendix I, https://arxiv.org/abs/2112.09332.
    """
    given = np.asarray(scores, np.float64)
    pool = given.shape[-1]
    if not 1 <= n <= pool:
        raise ValueError(f"the best of {n} cannot be told from {pool} samples")
    # From the largest down: C(i − 1, n − 1) / C(N, n) is n/N for the largest, then falls by (i − n + 1)/i … each step.
    weights = np.zeros(pool)
    weights[-1] = n / pool
    for i in range(pool - 1, n - 1, -1):  # the i-th smallest, from the one above it
        weights[i - 1] = weights[i] * (i - n + 1) / i
    if values is None:
        return np.sort(given, axis=-1) @ weights
    worth = np.asarray(values, np.float64)
    if worth.shape != given.shape:
        raise ValueError(f"values of shape {worth.shape} do not belong to scores of shape {given.shape}")
    # The weights of equal scores are shared: each gets the mean of those from its first place to its last.
    below = (given[..., None, :] < given[..., :, None]).sum(axis=-1)
    alike = (given[..., None, :] == given[..., :, None]).sum(axis=-1)
    whole = np.concatenate([[0.0], np.cumsum(weights)])
    return ((whole[below + alike] - whole[below]) / alike * worth).sum(axis=-1)


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
    floor: float
    """The error to expect at these counts if every prediction were right: it falls with the root of the counts."""


def calibration(margins: ArrayLike, outcomes: ArrayLike, *, bins: int) -> Calibration:
    """Compares σ(margin), what Bradley-Terry predicts, with how often it was so, in bins of equal width.

    `margins` are reward differences of the first response over the second, `outcomes` whether it won.
    If margins are always taken as chosen − rejected, every outcome is true and the table says nothing: turn a
    half of the pairs round. Raises ValueError without pairs.
    The error is above 0 also for right predictions, for each bin sees few outcomes. `floor` says how far: the mean
    absolute deviation of a binomial share in each bin, weighted as the error.
    Reference: Guo et al. 2017, eq. 3, https://arxiv.org/abs/1706.04599; the deviation is de Moivre's, in Diaconis &
    Zabell 1991, https://doi.org/10.1214/ss/1177011699.
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
    floor = sum(_mean_deviation(int(n), p) for n, p in zip(counts[used], mean_predicted, strict=True)) / logits.size
    return Calibration(mean_predicted, mean_observed, counts[used], float(error), floor)


def _mean_deviation(n: int, p: float) -> float:
    """E|X − np| of a binomial X: 2 k C(n, k) pᵏ (1 − p)ⁿ⁻ᵏ⁺¹ with k = ⌊np⌋ + 1."""
    if not 0 < p < 1:
        return 0.0
    k = min(n, math.floor(n * p) + 1)
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return 2 * k * math.exp(choose + k * math.log(p) + (n - k + 1) * math.log1p(-p))


def margin_calibration(margins: ArrayLike, *, bins: int) -> Calibration:
    """`calibration` of rewards chosen − rejected, [N]. Every second pair is turned round, for outcomes of both kinds.

    Raises ValueError without pairs.
    """
    signs = np.where(np.arange(np.size(margins)) % 2, -1.0, 1.0)
    return calibration(signs * np.asarray(margins), signs > 0, bins=bins)


def agreement(scores: Float[np.ndarray, " N"], heldout: Rankings) -> dict[str, Any]:
    """How well scores of all held-out answers, row by row, predict which of two answers people prefer.

    The rate with its interval, "pick the longer" beside it, and the calibration error with its floor.
    """
    scores = scores.reshape(heldout.ranks.shape)
    lengths = np.asarray(heldout.responses.mask).sum(axis=1).reshape(heldout.ranks.shape)
    rows = np.arange(len(scores))
    best, worst = heldout.ranks.argmin(axis=1), heldout.ranks.argmax(axis=1)
    accuracy, low, high = preference_accuracy(scores[rows, best], scores[rows, worst])
    margins = scores[rows, best] - scores[rows, worst]
    calibrated = margin_calibration(margins, bins=10)
    return {
        "val_accuracy": accuracy,
        "val_accuracy_low": low,
        "val_accuracy_high": high,
        "length_baseline": length_baseline(lengths[rows, best], lengths[rows, worst])[0],
        "calibration_error": calibrated.error,
        "calibration_floor": calibrated.floor,
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
