"""Rows of a run's file that are made part by part, so that a resumed run goes on where it was killed."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rlhf_jax.hosts import from_first
from rlhf_jax.log import Run


def write_parts(
    run: Run, what: str, file: Path, count: int, size: int, make: Callable[[range], list[dict[str, Any]]]
) -> None:
    """Writes what `make` gives for rows 0 … count − 1, `size` of them at a time, a JSON object a line.

    Each object has its row's number as "row". A resumed run makes the last part that the file has once more, unless
    the file is whole: then <file>.whole has its size, and it stays as it is. Every process calls `make`; the first one
    writes.
    """
    whole = file.with_name(f"{file.name}.whole")
    if from_first(lambda: whole.exists() and file.exists() and whole.read_text() == str(file.stat().st_size)):
        return
    first = from_first(lambda: take_up(file, size))
    parts = [range(start, min(start + size, count)) for start in range(first, count, size)]
    with open(file, "a", encoding="utf-8") if run.first else nullcontext() as lines:
        for part in run.progress(what, parts, total=len(parts)):
            rows = make(part)
            if lines is not None:
                lines.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                lines.flush()
    from_first(lambda: whole.write_text(str(file.stat().st_size)))


def take_up(file: Path, size: int) -> int:
    """The row to go on from: the first of the last part of `size` rows that the file has. That part is removed.

    Rows are in their order there. A line that a kill has cut short is removed, too. A line at a time is in memory.
    """
    if not file.exists():
        return 0
    first = begin = end = 0
    with open(file, "r+b") as lines:  # as bytes: a text may have characters inside that end a line to some
        for line in lines:
            if line.endswith(b"\n") and line.strip():
                part = json.loads(line)["row"] // size * size
                if part != first:
                    first, begin = part, end
            end += len(line)
        lines.truncate(begin)
    return first


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that `write_parts` or a person has written, one at a time."""
    with open(file, encoding="utf-8-sig", newline="\n") as lines:
        yield from (json.loads(line) for line in lines if line.strip())
