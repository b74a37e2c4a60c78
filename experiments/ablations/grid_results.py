"""A grid's results: means with intervals over seeds as tables, and lines with bands as a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from rlhf_jax.diagnostics import GaoFit, gao_fit


class Cells(NamedTuple):
    """The finished cells of a grid."""

    seeds: tuple[int, ...]
    variants: tuple[Any, ...]
    values: Mapping[tuple[int, Any], Mapping[str, Any]]
    """By seed and variant: numbers and curves by name, None where they were not finite."""
    missing: Mapping[tuple[int, Any], str]
    """The reasons why the other cells were not made."""

    def finished(self) -> list[Any]:
        """The variants of which at least one seed is there."""
        return [variant for variant in self.variants if any(one == variant for _, one in self.values)]

    def by_seed(self, variant: Any, name: str) -> dict[int, np.ndarray]:
        """The number or the curve that each seed's cell has under a name; cells without it are left out."""
        cells = {seed: self.values.get((seed, variant), {}) for seed in self.seeds}
        return {seed: np.asarray(cell[name], np.float64) for seed, cell in cells.items() if name in cell}

    def numbers(self, variant: Any, name: str) -> Float[np.ndarray, " N *S"]:
        """The same as one array."""
        return np.array(list(self.by_seed(variant, name).values()), np.float64)


def variant_name(variant: Any) -> str:
    """A variant in one word, as its files are named: dpo-beta-0.1."""
    parts = variant._asdict().items()
    return "-".join(value if isinstance(value, str) else f"{name}-{value:g}" for name, value in parts)


class Mean(NamedTuple):
    """The mean of numbers, and half of its 95% interval."""

    mean: Any
    half: Any
    """NaN for a single number."""


def mean_interval(values: ArrayLike) -> Mean:
    """The mean over the first axis and half of its 95% interval by Student's t: t₀.₉₇₅,ₙ₋₁ s/√n.

    It supposes that seeds are drawn from a normal distribution. NaN without any numbers.
    """
    from scipy.special import stdtrit

    x = np.asarray(values, np.float64)
    count = len(x)
    if count < 2:
        nothing = np.full(x.shape[1:], np.nan)
        return Mean(x[0] if count else nothing, nothing)
    return Mean(x.mean(axis=0), stdtrit(count - 1, 0.975) * x.std(axis=0, ddof=1) / np.sqrt(count))


# Tables.


class Column(NamedTuple):
    """A number of the cells in a table."""

    head: str
    name: str
    digits: int = 2
    extremes: bool = False
    """Whether the least and the most of the seeds stand beside the mean."""


class Table(NamedTuple):
    """Text in cells."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def variants_table(cells: Cells, heads: Sequence[str], columns: Sequence[Column]) -> Table:
    """A row a variant: its own fields under `heads`, then means over seeds, each ± half of a 95% interval."""
    rows = []
    for variant in cells.finished():
        row = [value if isinstance(value, str) else f"{value:g}" for value in variant]
        rows.append(row + [mean_text(cells.numbers(variant, column.name), column) for column in columns])
    return Table([*heads, *(column.head for column in columns)], rows)


def mean_text(values: np.ndarray, column: Column) -> str:
    """1.99 ± 0.25 (1.97, 2.01); the mean alone for one seed."""
    if not len(values):
        return ""
    mean, half = mean_interval(values)
    text = f"{mean:.{column.digits}f}"
    if len(values) > 1:
        text += f" ± {half:.{column.digits}f}"
        if column.extremes:
            text += f" ({values.min():.{column.digits}f}, {values.max():.{column.digits}f})"
    return text


def seeds_table(cells: Cells, variant: Any, columns: Sequence[Column]) -> Table:
    """A row a seed: the numbers of one variant."""
    found = {column.head: cells.by_seed(variant, column.name) for column in columns}
    rows = [
        [str(seed), *(f"{found[c.head][seed]:.{c.digits}f}" if seed in found[c.head] else "" for c in columns)]
        for seed in cells.seeds
        if (seed, variant) in cells.values
    ]
    return Table(["seed", *found], rows)


def differences_table(cells: Cells, base: Any, columns: Sequence[Column]) -> Table:
    """A row a number: each seed of `base`, and of the other variants with their difference from it, seed by seed."""
    others = [variant for variant in cells.finished() if variant != base]
    heads = ["", f"{variant_name(base)}: each seed", "sd over seeds"]
    for variant in others:
        heads += [f"{variant_name(variant)}: each seed", "difference: mean ± 95% interval (sd)"]
    rows = []
    for column in columns:
        reference = cells.by_seed(base, column.name)
        if not reference:
            continue
        row = [column.head, listed(list(reference.values())), spread(list(reference.values()))]
        for variant in others:
            values = cells.by_seed(variant, column.name)
            change = [values[seed] - reference[seed] for seed in values if seed in reference]
            mean, half = mean_interval(change)
            text = f"{mean:+.2g} ± {half:.2g} ({spread(change)})" if len(change) > 1 else f"{mean:+.2g}"
            row += [listed(list(values.values())), text]
        rows.append(row)
    return Table(heads, rows)


def listed(values: Any) -> str:
    """Each seed's number."""
    return ", ".join(f"{value:.4g}" for value in values)


def spread(values: Sequence[Any]) -> str:
    """The standard deviation over seeds; nothing for one."""
    return f"{np.std(values, ddof=1):.2g}" if len(values) > 1 else ""


def missing_line(cells: Cells) -> str:
    """Which cells are missing, and why, in one line; nothing where all are there."""
    if not cells.missing:
        return ""
    each = [f"seed {seed} {variant_name(variant)} ({why})" for (seed, variant), why in cells.missing.items()]
    return f"{len(each)} of {len(each) + len(cells.values)} cells are missing: {'; '.join(each)}."


def table_markdown(table: Table) -> str:
    """A table as people read it."""
    return rows_markdown(table.heads, table.rows)


def rows_markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; a bar inside a cell, as in 1/|o|, is no border."""
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in [heads, ["---"] * len(heads), *rows])
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)


def tables_markdown(page: "Page", cells: Cells) -> str:
    """Tables as people read them, what the intervals are, and which cells are missing."""
    parts = [table_markdown(table) for table in page.tables]
    many = "Each ± is half of a 95% interval over seeds, by Student's t."
    parts.append(f"{len(cells.seeds)} seeds. {many}" if len(cells.seeds) > 1 else "One seed: there are no intervals.")
    return "\n\n".join([*parts, *filter(None, [missing_line(cells)])]) + "\n"


def summarize(cells: Cells) -> dict[str, Any]:
    """Every number of every variant over its seeds, for programs to read; null is what is not there or not finite."""
    variants: dict[str, dict[str, Any]] = {}
    for variant in cells.finished():
        names = dict.fromkeys(name for (_, one), some in cells.values.items() if one == variant for name in some)
        numbers = variants[variant_name(variant)] = {}
        for name in names:
            values = cells.numbers(variant, name)
            if values.ndim == 1:
                mean, half = mean_interval(values)
                found = {"mean": mean, "low": mean - half, "high": mean + half}
                found |= {"least": values.min(), "most": values.max(), "seeds": len(values)}
                numbers[name] = {key: x.item() if np.isfinite(x) else None for key, x in
                                 ((key, np.asarray(x)) for key, x in found.items())}  # fmt: skip
    missing = [{"seed": seed, "variant": variant_name(one), "why": why} for (seed, one), why in cells.missing.items()]
    return {"interval": "95%, Student's t over seeds", "seeds": cells.seeds, "variants": variants, "missing": missing}


# The figure.


class Line(NamedTuple):
    """Points of a figure, and half of the interval of each y."""

    label: str
    x: Float[np.ndarray, " N"]
    y: Float[np.ndarray, " N"]
    half: Float[np.ndarray, " N"] | None = None
    style: str = "-"
    """Matplotlib's line style. "o-", "o" and "s" show intervals as bars, any other style as a band."""
    color: str | None = None
    """By default another one for each line of a panel."""


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]


class Page(NamedTuple):
    """The tables and the figure of an ablation."""

    tables: Sequence[Table]
    panels: Sequence[Panel] = ()


def curve_line(cells: Cells, variant: Any, x: str | None, y: str, label: str) -> Line:
    """Two curves of a variant against each other: means over seeds, point by point, with the interval of y.

    Without `x` against the number of each point, from 1.
    """
    mean, half = mean_interval(cells.numbers(variant, y))
    across = np.arange(1.0, len(mean) + 1) if x is None else cells.numbers(variant, x).mean(axis=0)
    return Line(label, across, mean, half)


def points_line(cells: Cells, variants: Sequence[Any], x: str, y: str, label: str) -> Line:
    """Two numbers against each other: a point a variant, means over seeds, with the interval of y."""
    means = [mean_interval(cells.numbers(variant, y)) for variant in variants]
    across = np.array([cells.numbers(variant, x).mean() for variant in variants])
    half = np.array([one.half for one in means])
    return Line(label, across, np.array([one.mean for one in means]), half, style="o-")


def gao_line(line: Line, start: float) -> Line:
    """Gao et al.'s form with its R², fitted to a line of rewards against d = √KL that begins at `start`."""
    fit = fit_gain(line.x**2, line.y - start)
    d = np.linspace(max(line.x.min(), 0.05), line.x.max(), 200)
    return Line(f"d(α − β log d), R² {fit.r2:.2f}", d, start + fit(d**2), style=":", color="k")


def fit_gain(kl: np.ndarray, gained: np.ndarray) -> GaoFit:
    """`gao_fit`, and NaN where there are too few points at a positive KL."""
    try:
        return gao_fit(kl, gained)
    except ValueError:
        return GaoFit(np.nan, np.nan, np.nan)


def smooth(x: np.ndarray, width: int = 5) -> np.ndarray:
    """Running mean over iterations, each of which sees few answers."""
    return np.convolve(x, np.ones(width) / width, mode="valid")


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Writes the panels beside each other as an SVG; the last one has the legend."""
    import matplotlib
    from matplotlib.figure import Figure

    from rlhf_jax.figures import STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for i, line in enumerate(panel.lines):
                color = line.color or f"C{i}"
                axes.plot(line.x, line.y, line.style, color=color, label=line.label)
                if line.half is None or not np.isfinite(line.half).any():
                    continue
                if line.style[0] in "os":
                    axes.errorbar(line.x, line.y, line.half, fmt="none", ecolor=color, capsize=3)
                else:
                    low, high = line.y - line.half, line.y + line.half
                    axes.fill_between(line.x, low, high, color=color, alpha=0.15, linewidth=0)
            axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        axes.legend(fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})
