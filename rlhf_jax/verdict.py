"""A report's verdict on a run, good or bad: rules as data, and their findings in its metrics."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Rows = Sequence[Mapping[str, Any]]
"""Metrics of one stage, in order of steps."""
FEWEST = 4
"""Measurements below which nothing is said of how a metric moved."""


class Condition(NamedTuple):
    """A condition on one metric. Its start and its end are the means of the first and the last fifth."""

    metric: str
    sees: Literal[
        "ends below", "ends above", "shrinks to", "grows to", "rises", "falls", "does not rise", "does not fall"
    ]
    threshold: float
    """ends: in the metric's unit. shrinks, grows: end over start. Otherwise (end - start) in standard errors."""


class Rule(NamedTuple):
    """A sentence for runs in which all conditions hold, and perhaps one for those in which not all do.

    Sentences may name {start} and {end} of the first condition's metric, and {starts[1]}, {ends[1]} of the second,
    with a format, as in {end:.0%}.
    """

    stage: str | None
    """The stage that logged the metrics. None: numbers of summary.json, which have one value each."""
    conditions: tuple[Condition, ...]
    sentence: str
    fine: str = ""


class Finding(NamedTuple):
    """A sentence that a rule says about a run."""

    bad: bool
    sentence: str


def findings(rules: Sequence[Rule], stages: Mapping[str, Rows], summary: Mapping[str, Any]) -> list[Finding]:
    """The findings of the rules, the bad first. A rule says nothing about a metric with too few measurements."""
    found = []
    for rule in rules:
        rows = [{"step": 0, **summary}] if rule.stage is None else stages.get(rule.stage, [])
        measured = [series(rows, condition.metric)[1] for condition in rule.conditions]
        held = [holds(condition, values) for condition, values in zip(rule.conditions, measured, strict=True)]
        if None in held:
            continue
        sentence = rule.sentence if all(held) else rule.fine
        if sentence:
            starts, ends = ([mean(values) for values in which] for which in zip(*map(_ends, measured), strict=True))
            text = sentence.format(start=starts[0], end=ends[0], starts=starts, ends=ends)
            found.append(Finding(all(held), text))
    return sorted(found, key=lambda finding: not finding.bad)


def holds(condition: Condition, values: Float[np.ndarray, " N"]) -> bool | None:
    """Whether a series of values, at least one, is as the condition has it; None where they are too few to say."""
    if not values.size:
        return None
    start, end = map(mean, _ends(values))
    if condition.sees == "ends below":
        return end < condition.threshold
    if condition.sees == "ends above":
        return end > condition.threshold
    if values.size < FEWEST:
        return None
    if condition.sees == "shrinks to":
        return end < condition.threshold * start
    if condition.sees == "grows to":
        return end > condition.threshold * start
    up, down = moved(values) > condition.threshold, moved(values) < -condition.threshold
    return {"rises": up, "falls": down, "does not rise": not up, "does not fall": not down}[condition.sees]


def moved(values: Float[np.ndarray, " N"]) -> float:
    """(end - start) in standard errors; the noise of one value is that of its difference from the one before."""
    first, last = _ends(values)
    difference = mean(last) - mean(first)
    if not difference:
        return 0.0
    noise = np.sqrt(np.mean(np.diff(values) ** 2) / 2)
    return float(difference / (noise * np.sqrt(1 / first.size + 1 / last.size)))


def series(rows: Rows, name: str) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Steps and values of a metric where it was logged as a number."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    steps, values = np.array(found, np.float64).reshape(-1, 2).T
    return steps, values


def mean(values: Float[np.ndarray, " N"]) -> float:
    """The mean as a Python float."""
    return float(np.mean(values))


def _ends(values: Float[np.ndarray, " N"]) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    size = max(1, values.size // 5)
    return values[:size], values[-size:]
