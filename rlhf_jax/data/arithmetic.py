"""Sums whose difficulty is a number: prompts with answers for a checker, which a small model can learn from.

    python -m rlhf_jax.data.arithmetic FILE --count 2000 --digits 2 --terms 2

Each row has a prompt that demands the form "#### NUMBER", an answer in that form, and its kind. The rows are what
`--prompts FILE --reward math` reads.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_jax.errors import UserError

Kind = Literal["add", "subtract", "multiply", "compare", "largest"]
KINDS: tuple[Kind, ...] = ("add", "compare", "largest")
FORM = "Answer with #### and the number only."


def make_problems(
    count: int, *, digits: int, terms: int = 2, kinds: Sequence[Kind] = KINDS, seed: int = 0
) -> list[dict[str, Any]]:
    """So many rows {"prompt", "answer", "kind"}; no prompt twice, as far as there are enough.

    Numbers have at most `digits` digits. add, subtract and multiply join `terms` of them, largest picks from `terms`
    + 1, compare asks for the larger of two. Raises ValueError for less than a digit, two terms, a kind, or a row.
    """
    if count < 1 or digits < 1 or terms < 2 or not kinds:
        raise ValueError(f"{count} rows of {digits} digits, {terms} terms, {len(kinds)} kinds: each needs more")
    rng, rows, seen = np.random.default_rng(seed), list[dict[str, Any]](), set[str]()
    tries = 0
    while len(rows) < count:
        kind = kinds[int(rng.integers(len(kinds)))]
        row = _problem(kind, rng.integers(0, 10**digits, _terms(kind, terms)).tolist())
        tries += 1
        if row["prompt"] in seen and tries < 20 * count:
            continue
        seen.add(row["prompt"])
        rows.append(row)
    return rows


def _terms(kind: Kind, terms: int) -> int:
    return {"compare": 2, "largest": terms + 1}.get(kind, terms)


def _problem(kind: Kind, numbers: Sequence[int]) -> dict[str, Any]:
    question, answer = {
        "add": (f"What is {' + '.join(map(str, numbers))}?", sum(numbers)),
        "subtract": (f"What is {' - '.join(map(str, numbers))}?", numbers[0] - sum(numbers[1:])),
        "multiply": (f"What is {' * '.join(map(str, numbers))}?", int(np.prod(numbers, dtype=object))),
        "compare": (f"Which is larger, {numbers[0]} or {numbers[-1]}?", max(numbers)),
        "largest": (f"Which is the largest of {', '.join(map(str, numbers))}?", max(numbers)),
    }[kind]
    return {"prompt": f"{question} {FORM}", "answer": f"#### {answer}", "kind": kind}


@dataclass(frozen=True)
class Config:
    """Writes sums to a file, a row a line."""

    file: str
    """The file, .jsonl."""
    count: int = 2000
    """Rows."""
    digits: int = 2
    """The most digits of a number."""
    terms: int = 2
    """Numbers in a sum."""
    kinds: tuple[Kind, ...] = KINDS
    seed: int = 0


def main(cfg: Config) -> None:
    """Writes the file. Raises UserError for numbers that are too small, or a file that is there."""
    try:
        rows = make_problems(cfg.count, digits=cfg.digits, terms=cfg.terms, kinds=cfg.kinds, seed=cfg.seed)
    except ValueError as error:
        raise UserError(str(error)) from None
    if Path(cfg.file).exists():
        raise UserError(f"{cfg.file} is there already: name another file")
    Path(cfg.file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows: {cfg.file}")


if __name__ == "__main__":
    import tyro

    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):  # the file needs no flag
        sys.argv.insert(1, "--file")
    try:
        main(tyro.cli(Config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
