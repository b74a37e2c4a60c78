"""Groups of answers with their scores: which groups have a signal, and what is measured of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.evaluate import pass_at_k
from rlhf_jax.rewards.reward import HostScores, added, host_metrics, score_metrics
from rlhf_jax.rewards.watch import answer_statistics


class Scored(NamedTuple):
    """Groups of answers with their scores, as numpy arrays."""

    prompts: Prompts
    completions: Completions
    scores: Float[np.ndarray, " B"]
    each: dict[str, Float[np.ndarray, " B"]]
    """By reward; NaN where one does not apply."""
    found: Mapping[str, HostScores]


def has_signal(scores: Float[np.ndarray, " B"], group_size: int) -> Bool[np.ndarray, " P"]:
    """Whether the answers to a prompt differ in score."""
    groups = scores.reshape(-1, group_size)
    return (groups != groups[:, :1]).any(axis=1)


def all_rounds(parts: Sequence[Scored]) -> Scored:
    """The groups of several rounds as one."""
    if len(parts) == 1:
        return parts[0]
    arrays = jax.tree.map(lambda *x: np.concatenate(x), *(part._replace(found={}) for part in parts))
    return arrays._replace(found={name: added([part.found[name] for part in parts]) for name in parts[0].found})


def rows_with_signal(
    scores: Float[np.ndarray, " B"], prompts: int, group_size: int
) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """The rows of so many groups, and whether each one's group has a signal.

    Those with a signal come first, then others, each in the order it was sampled.
    """
    signal = has_signal(scores, group_size)
    groups = np.argsort(~signal, kind="stable")[:prompts]
    rows = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
    return rows, signal[groups].repeat(group_size)


def group_metrics(scored: Scored, ended: Bool[np.ndarray, " B"], group_size: int) -> dict[str, Any]:
    """Metrics of scored groups: scores, groups without a signal, ends, lengths, and of a checker pass@1 and pass@k.

    `ended` says of each answer whether it ended by itself.
    The first reward that `is_checker` is taken. Lengths are then also those of right and of wrong answers. A group in
    which the checker does not apply to every answer is left out of both.
    """
    lengths = scored.completions.mask.sum(axis=1)
    metrics: dict[str, Any] = {
        "score": scored.scores.mean(),
        "silent": 1.0 - has_signal(scored.scores, group_size).mean(),
        "ended": ended.mean(),
        **answer_statistics(scored.prompts, scored.completions),
        **{name: float(value) for name, value in score_metrics(scored.each).items()},
        **host_metrics(scored.found),
    }
    checked = next((some for some in scored.each.values() if is_checker(some)), None)
    if checked is None:
        return metrics
    right = checked.reshape(-1, group_size).sum(axis=1)
    right = right[~np.isnan(right)]
    if len(right):
        metrics["pass@1"] = right.mean() / group_size
        metrics[f"pass@{group_size}"] = pass_at_k(right, group_size, group_size).mean()
    for name, value in (("right", 1), ("wrong", 0)):
        some = checked == value
        metrics[f"length_{name}"] = lengths[some].mean() if some.any() else np.nan
    return metrics


def is_checker(scores: Float[np.ndarray, "..."]) -> bool:
    """Whether a reward says right or wrong: all of its scores are 1 or 0, but for those to which it does not apply."""
    return bool(np.isin(scores, (0, 1)).any() and (np.isin(scores, (0, 1)) | np.isnan(scores)).all())
