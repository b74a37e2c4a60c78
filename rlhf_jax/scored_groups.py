"""Groups of answers with their scores: which groups have a signal, and what is measured of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

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
    """Whether the answers to a prompt differ in score: where they do not, every advantage is 0."""
    groups = scores.reshape(-1, group_size)
    return (groups != groups[:, :1]).any(axis=1)


def with_signal(parts: Sequence[Scored], prompts: int, group_size: int) -> Scored:
    """So many groups of several rounds: those with a signal first, then others, each in the order it was sampled.

    What was counted on the host is of all rounds.
    """
    arrays = jax.tree.map(lambda *x: np.concatenate(x), *(part._replace(found={}) for part in parts))
    groups = np.argsort(~has_signal(arrays.scores, group_size), kind="stable")[:prompts]
    rows = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
    found = {name: added([part.found[name] for part in parts]) for name in parts[0].found}
    return jax.tree.map(lambda x: x[rows], arrays)._replace(found=found)


def group_metrics(scored: Scored, ended: Bool[np.ndarray, " B"], group_size: int) -> dict[str, Any]:
    """Metrics of scored groups: scores, groups without a signal, ends, lengths, and of a checker pass@1 and pass@k.

    `ended` says of each answer whether it ended by itself.
    A reward counts as a checker when all of its scores are 0 or 1; the first one of these is taken. Lengths are then
    also those of right and of wrong answers.
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
    checked = next((some for some in scored.each.values() if np.isin(some, (0, 1)).all()), None)
    if checked is None:
        return metrics
    right = checked.reshape(-1, group_size).sum(axis=1)
    metrics["pass@1"] = checked.mean()
    metrics[f"pass@{group_size}"] = pass_at_k(right, group_size, group_size).mean()
    for name, some in (("right", checked == 1), ("wrong", checked == 0)):
        metrics[f"length_{name}"] = lengths[some].mean() if some.any() else np.nan
    return metrics
