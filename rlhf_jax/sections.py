"""The content of a report as plain data: sections of pictures and tables, each named by the metrics it shows.

PPO = Section("PPO", "The policy maximises the score.", "ppo", "iteration", panels=(
    Panel("the proxy", (Line("score", "score", PROXY),)),
))
"""

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from rlhf_jax.verdict import Rule

TRUTH, PROXY, START, QUIET = "#0b7a75", "#d9772b", "#5b6b8c", "#9aa3b2"
"""Colours of lines: what is wanted, what stands for it, where training starts, and what is only beside."""


class Line(NamedTuple):
    """A metric (or a number of summary.json), what it is called, and the colour it has."""

    metric: str
    label: str
    colour: str = START


class Panel(NamedTuple):
    """A picture of metrics over the steps of the section's stage."""

    title: str
    lines: tuple[Line, ...]


class Point(NamedTuple):
    """A number of summary.json, and the one that is its standard error."""

    value: str
    error: str | None
    label: str
    colour: str


class Arrow(NamedTuple):
    """A picture of two numbers of summary.json, from the first to the second, and perhaps a mark beside them."""

    start: Point
    end: Point
    xlabel: str
    mark: Line | None = None


class Rates(NamedTuple):
    """A picture of numbers of summary.json, with their intervals (NAME_low, NAME_high), and of chance."""

    rates: tuple[Line, ...]
    chance: float
    xlabel: str


class Frontier(NamedTuple):
    """A picture of metrics against the root of a divergence, and Gao et al.'s fit, d (α - β log d), of one of them."""

    divergence: str
    lines: tuple[Line, ...]
    fit: str
    start: str | None
    """The number of summary.json from which what is fitted begins; by default the first value."""
    xlabel: str


class Column(NamedTuple):
    """A metric in a table, and how its best row is marked."""

    metric: str
    label: str
    best: Literal["highest", "lowest"]
    mark: str
    digits: int = 3


class Table(NamedTuple):
    """A row a step, of those steps that have all columns."""

    step: str
    """The word for a step."""
    columns: tuple[Column, ...]


class Costs(NamedTuple):
    """Metrics of the machine: means over all steps but the first, which compiles; and values at the last step."""

    means: tuple[Line, ...]
    lasts: tuple[Line, ...] = ()


class Section(NamedTuple):
    """A heading, a note, and whatever of the rest has something to show; without any, the section is left out."""

    title: str
    note: str = ""
    stage: str = ""
    """The stage whose metrics are shown."""
    xlabel: str = "step"
    panels: tuple[Panel, ...] = ()
    arrow: Arrow | None = None
    rates: Rates | None = None
    table: Table | None = None
    frontier: Frontier | None = None
    costs: Costs | None = None
    sentences: tuple[str, ...] = ()
    """Added to the note where summary.json has the numbers that they name, as in {win_rate:.1%}."""


class Examples(NamedTuple):
    """Answers side by side, from examples.jsonl: each line has a prompt, answers by name, and NAME_NUMBER."""

    title: str
    note: str
    answers: tuple[Line, ...]
    numbers: tuple[Line, ...] = ()


class Report(NamedTuple):
    """A whole page. Its verdict, numbers, config, and where the run came from are there without being asked for."""

    headlines: tuple[Section, ...] = ()
    """The first of these that has something to show opens the page."""
    sections: tuple[Section, ...] = ()
    examples: Examples | None = None
    rules: tuple[Rule, ...] = ()
    explained: Mapping[str, str] = {}
    """Sentences about numbers of summary.json, by name and in the order of the table."""


def plain_report(stages: Mapping[str, list[dict[str, Any]]]) -> Report:
    """Every metric of every stage in a picture of its own, for a run that nobody has said anything about."""
    sections = []
    for stage, rows in stages.items():
        names = dict.fromkeys(name for row in rows for name in row if name not in ("stage", "step", "time"))
        panels = tuple(Panel(name, (Line(name, name, QUIET),)) for name in names)
        sections.append(Section(stage, "Every metric that was logged.", stage, panels=panels))
    return Report(sections=tuple(sections))


def to_json(value: Any) -> Any:
    """JSON's objects and lists for named tuples and tuples."""
    if hasattr(value, "_asdict"):
        return {name: to_json(part) for name, part in value._asdict().items()}
    return [to_json(part) for part in value] if isinstance(value, tuple) else value


def from_json(kind: Any, value: Any) -> Any:
    """The value of a type that `to_json` was given. Raises TypeError or AttributeError for what it did not write."""
    if isinstance(kind, types.UnionType):
        return None if value is None else from_json(typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is tuple:
        return tuple(from_json(typing.get_args(kind)[0], part) for part in value)
    if hasattr(kind, "_fields"):
        hints = typing.get_type_hints(kind)
        return kind(**{name: from_json(hints.get(name), part) for name, part in value.items()})
    return value
