"""Claims of the literature: a number for each seed of a grid, its interval, and whether the claim stands.

An ablation lists its claims as CLAIMS. Its page has them with what the paper found and what was found here;
`pages.py --check` decides them again from the stored numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.ablations.grid_results import Cells, Table, mean_interval

Numbers = Callable[[Cells], Mapping[int, float]]
"""numbers(cells) -> a number for each seed. Raises KeyError where the cells have none of its variants."""


class Claim(NamedTuple):
    """A claim, and the number that decides it: it stands where the interval is above `above` and below `below`."""

    text: str
    source: str
    paper: str
    """The paper's finding, in its own numbers where it has any."""
    numbers: Numbers
    unit: str = ""
    above: float = -np.inf
    below: float = np.inf
    digits: int = 2


class Verdict(NamedTuple):
    """A claim's number, and whether it stands: None where its interval does not decide it, and for one seed."""

    mean: float
    half: float
    """NaN for one seed, which decides nothing."""
    seeds: int
    stands: bool | None


def decide(claim: Claim, cells: Cells) -> Verdict | None:
    """The verdict on a claim; None where its cells were not made."""
    try:
        numbers = list(claim.numbers(cells).values())
    except KeyError:
        return None
    if not numbers:
        return None
    mean, half = (float(x) for x in mean_interval(numbers))
    low, high, stands = mean - half, mean + half, None
    if low > claim.above and high < claim.below:
        stands = True
    elif high <= claim.above or low >= claim.below:
        stands = False
    return Verdict(mean, half, len(numbers), stands)


def verdict_words(claim: Claim, verdict: Verdict | None) -> tuple[str, str]:
    """(what was found here, whether it agrees), for tables."""
    if verdict is None:
        return "not made", ""
    found = f"{verdict.mean:.{claim.digits}f}"
    found += f" ± {verdict.half:.{claim.digits}f}" if np.isfinite(verdict.half) else " (one seed)"
    agrees = {True: "yes", False: "no", None: "not decided"}[verdict.stands]
    return f"{found}{' ' * bool(claim.unit)}{claim.unit}", agrees


def verdicts(claims: Sequence[Claim], cells: Cells) -> list[dict[str, Any]]:
    """Each claim's text, and whether it stands: "not made" where its cells were not."""
    decided = [(claim, decide(claim, cells)) for claim in claims]
    return [{"text": claim.text, "stands": "not made" if one is None else one.stands} for claim, one in decided]


def bounds(claim: Claim) -> str:
    """Where the number has to lie, in words."""
    ends = [f"{word} {bound:g}" for word, bound in (("above", claim.above), ("below", claim.below))
            if np.isfinite(bound)]  # fmt: skip
    return " and ".join(ends)


def claims_table(claims: Sequence[Claim], cells: Cells) -> Table:
    """A row a claim."""
    rows = []
    for claim in claims:
        found, agrees = verdict_words(claim, decide(claim, cells))
        rows.append([claim.text, f"{claim.source}: {claim.paper}", found, bounds(claim), agrees])
    return Table(["claim", "the paper", "here", "it stands", "agrees"], rows)


# Numbers of cells.


def of(name: str, **fields: Any) -> Numbers:
    """A number of the variant with these fields."""
    return lambda cells: {seed: float(x) for seed, x in cells.by_seed(variant_of(cells, **fields), name).items()}


def minus(first: Numbers, second: Numbers) -> Numbers:
    """The difference of two numbers, seed by seed."""

    def numbers(cells: Cells) -> dict[int, float]:
        one, other = first(cells), second(cells)
        return {seed: one[seed] - other[seed] for seed in one if seed in other}

    return numbers


def times(factor: float, some: Numbers) -> Numbers:
    """So many times a number, seed by seed."""
    return lambda cells: {seed: factor * number for seed, number in some(cells).items()}


def variant_of(cells: Cells, **fields: Any) -> Any:
    """The first finished variant with these fields. Raises KeyError where there is none."""
    for variant in cells.finished():
        if all(getattr(variant, name) == value for name, value in fields.items()):
            return variant
    raise KeyError(fields)
