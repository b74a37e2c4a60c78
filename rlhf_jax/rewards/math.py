"""Answers to sums: the number that a response arrives at, and whether it is the right one."""

import re
from decimal import Decimal
from typing import NamedTuple

# A minus belongs to the number unless it stands after something to be subtracted from.
NUMBER = re.compile(
    r"""(?P<minus>(?<![\w.)\]])[-−])? (?:[$€£]\s?(?P<after>[-−])?)?
    (?P<digits>\d{1,3}(?:,\d{3})+(?![\d,]*\d)(?:\.\d+)? | \d+(?:\.\d+)? | (?<!\d)\.\d+)""",
    re.VERBOSE | re.ASCII,
)
MARK = re.compile(r"####\s*(.*)")


class Correct(NamedTuple):
    """Whether a response has the right number."""

    strict: bool
    """Right after the first "####", which is how GSM8K's own solutions end."""
    lenient: bool
    """There, or, without one, at the end: the last number of the response."""


def grade(response: str, answer: str) -> Correct:
    """Compares a response's number with an answer's, as values: 18 is $18.00, 1,800 is 1800.

    `answer` is a number, or a solution that ends in "#### " and the number. Raises ValueError when it has none.
    Reference: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems", https://arxiv.org/abs/2110.14168.
    """
    right = lenient_number(answer)
    if right is None:
        raise ValueError(f"the answer {answer!r} has no number")
    return Correct(strict_number(response) == right, lenient_number(response) == right)


def strict_number(text: str) -> Decimal | None:
    """The number right after the first "####", None without one."""
    mark = MARK.search(text)
    number = NUMBER.match(mark[1]) if mark else None
    return _value(number) if number else None


def lenient_number(text: str) -> Decimal | None:
    """`strict_number`, or else the last number anywhere, None without any."""
    strict = strict_number(text)
    if strict is not None:
        return strict
    found = list(NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def _value(match: re.Match[str]) -> Decimal:
    size = Decimal(match["digits"].replace(",", ""))
    return -size if match["minus"] or match["after"] else size
