"""The report's pictures, as SVG text. Matplotlib's objects only: no global state, no display."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_jax.diagnostics import GaoFit, gao_fit
from rlhf_jax.sections import QUIET, TRUTH, Line
from rlhf_jax.verdict import Rows, series

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, sharp, and in the reader's own font
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c4cad4",
    "axes.labelcolor": "#4a5362",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff3",
    "xtick.color": "#4a5362",
    "ytick.color": "#4a5362",
    "legend.frameon": False,
}


class Mean(NamedTuple):
    """A mean on a line, with its standard error."""

    label: str
    value: float
    error: float
    colour: str


def arrow(start: Mean, end: Mean, mark: tuple[str, float] | None, xlabel: str) -> str:
    """Two means, from the first to the second, and a value beside them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.9), layout="constrained")
        axes = figure.add_subplot()
        axes.set_ylim(-1, 1.2)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        style = {"arrowstyle": "-|>", "color": QUIET, "lw": 2, "shrinkB": 9}
        axes.annotate("", (end.value, 0), (start.value, 0), arrowprops=style)
        for one in (start, end):
            axes.errorbar([one.value], [0], xerr=[1.96 * one.error], fmt="o", ms=11, color=one.colour, capsize=4)
            axes.annotate(
                f"{one.label} {one.value:.2f}", (one.value, 0), xytext=(0, 13), textcoords="offset points",
                ha="center", color=one.colour, weight="bold", size=12,
            )  # fmt: skip
        if mark is not None:
            label, value = mark
            axes.axvline(value, color="#444c5a", ls="--", lw=1.2)
            axes.annotate(
                f"{label} {value:.2f}", (value, -0.85), xytext=(5, 0), textcoords="offset points", color="#444c5a"
            )
        axes.margins(x=0.15)
        axes.set_xlabel(xlabel)
        return _svg(figure)


def intervals(rates: Sequence[tuple[str, float, float, float]], chance: float, label: str) -> str:
    """Named rates with their intervals, one a line, and the rate of chance."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.7 + 0.45 * len(rates)), layout="constrained")
        axes = figure.add_subplot()
        for y, (_, rate, low, high) in enumerate(rates):
            color = TRUTH if y == 0 else QUIET
            errors = [[max(0.0, rate - low)], [max(0.0, high - rate)]]
            axes.errorbar([rate], [y], xerr=errors, fmt="o", ms=9, color=color, capsize=4)
            axes.annotate(
                f"{rate:.1%}", (rate, y), xytext=(0, 9), textcoords="offset points", ha="center", color=color
            )
        axes.set_yticks(range(len(rates)), [name for name, *_ in rates])
        axes.set_ylim(len(rates) - 0.4, -0.7)
        axes.axvline(chance, color="#444c5a", ls="--", lw=1.2)
        axes.set_xlabel(label)
        return _svg(figure)


def curve(rows: Rows, title: str, lines: Sequence[Line], xlabel: str) -> str | None:
    """Metrics of one stage over its steps; None when none was logged."""
    if not any(series(rows, metric)[0].size for metric, _, _ in lines):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        _lines(axes, rows, lines)
        axes.set_title(title, loc="left", size=10.5)
        axes.set_xlabel(xlabel)
        return _svg(figure)


def frontier(
    rows: Rows, divergence: str, lines: Sequence[Line], xlabel: str, *, fit: str, start: float | None
) -> tuple[str, GaoFit | None] | None:
    """Metrics against the root of a divergence, and Gao et al.'s fit of the metric `fit`.

    What is fitted is the rise over `start`, by default over the first value; with fewer than 3 points nothing is.
    None when the divergence was not logged.
    """
    rows = [row for row in rows if isinstance(row.get(divergence), int | float)]
    if not rows:
        return None
    found = None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, legend, color in lines:
            points = [(row[divergence], row[name]) for row in rows if isinstance(row.get(name), int | float)]
            if not points:
                continue
            kl, values = np.array(points, np.float64).T
            axes.plot(np.sqrt(np.maximum(kl, 0)), values, "o-", color=color, label=legend, ms=3.5, lw=1)
            if name == fit and np.sum(kl > 0) >= 3:
                base = values[0] if start is None else start
                found = gao_fit(kl, values - base)
                grid = np.linspace(0, max(kl.max(), 0), 200)
                axes.plot(np.sqrt(grid), base + found(grid), "--", color="#444c5a", lw=1.2, label="d (α − β log d)")
        axes.set_xlabel(xlabel)
        axes.legend()
        return _svg(figure), found


def _lines(axes: Axes, rows: Rows, lines: Sequence[Line]) -> None:
    for metric, legend, color in lines:
        steps, values = series(rows, metric)
        if not steps.size:
            continue
        sparse = steps.size <= 40
        noisy = steps.size > 200
        axes.plot(steps, values, "o-" if sparse else "-", ms=3, lw=1.2, color=color, alpha=0.3 if noisy else 1.0,
                  label=None if noisy else legend)  # fmt: skip
        if noisy:
            width = steps.size // 40
            smooth = np.convolve(values, np.ones(width) / width, "valid")
            axes.plot(steps[width - 1 :], smooth, color=color, lw=1.6, label=legend)
    if len(lines) > 1:
        axes.legend(fontsize=9)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    layout = figure.get_layout_engine()
    if layout is not None:  # once: savefig would ask for it twice, which is half of a picture's time
        layout.execute(figure)
        figure.set_layout_engine(None)
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Group names repeat from picture to picture, and an id must be unique on a page.
    return re.sub(r'<g id="[^"]*"', "<g", text)
