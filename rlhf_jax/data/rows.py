"""A source's rows in one of the forms of `formats`: columns renamed, the form recognised, bad rows rejected."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from rlhf_jax.data.formats import COLUMNS, FORMATS, known, normalise, recognise
from rlhf_jax.data.rejects import BadRow, Rejects
from rlhf_jax.data.sources import Broken, read_source
from rlhf_jax.errors import UserError

LOOKED_AT = 1000
"""Rows among which one must have columns that are recognised."""


class Read(NamedTuple):
    """A usable row: its number in the source (from 0), what it became, and its fields as they came."""

    number: int
    row: Any
    fields: dict[str, Any]


def find_format(
    source: str, kind: str, *, format: str | None = None, columns: Sequence[str] = (), streaming: bool = False
) -> str:
    """The name of the form that a source's rows have: `format` if given, else by the columns of the first that fits.

    `columns` are "ours=theirs". Raises UserError when no form fits, or several do: nothing is guessed.
    """
    renamed = parse_columns(columns)
    if format is not None:
        if format not in FORMATS or FORMATS[format].kind != kind:
            raise UserError(f"{format!r} is no format of {kind}; known are: {known(kind)}")
        return format
    reason = ""
    for place, fields in islice(read_source(source, streaming=streaming), LOOKED_AT):
        if isinstance(fields, Broken):
            reason = reason or f"{place}: {fields.reason}"
            continue
        named = _rename(fields, renamed)
        try:
            found = recognise({name for name, value in named.items() if value is not None}, kind)
        except UserError as error:
            raise UserError(f"{place}: {error} by --{kind}-format") from None
        if found is not None:
            return found
        names = ", ".join(sorted(map(str, fields))) or "(none)"
        reason = reason if " fields " in reason else f"{place}: fields {names}; known {kind} are: {known(kind)}"
    raise UserError(reason)


def read_rows(
    source: str,
    format: str,
    rejects: Rejects,
    *,
    columns: Sequence[str] = (),
    start: int = 0,
    streaming: bool = False,
) -> Iterator[Read]:
    """Every usable row of a source from number `start` on, one by one; `rejects` hears of the others."""
    renamed = parse_columns(columns)
    for number, (place, fields) in enumerate(read_source(source, start=start, streaming=streaming), start):
        if isinstance(fields, Broken):
            rejects.reject(place, fields.reason, fields.text)
            continue
        try:
            for ours in FORMATS[format].columns:
                if renamed.get(ours, ours) not in fields:
                    raise BadRow(f"field {renamed.get(ours, ours)!r} is missing")
            row = normalise(format, _rename(fields, renamed), place)
        except BadRow as error:
            rejects.reject(place, str(error), fields)
        else:
            yield Read(number, row, fields)


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """ "ours=theirs" -> {ours: theirs}. Raises UserError."""
    renamed = {}
    for pair in columns:
        ours, equals, theirs = pair.partition("=")
        if not equals or not theirs or ours not in COLUMNS:
            raise UserError(f"{pair!r} is not OURS=THEIRS with OURS one of {', '.join(sorted(COLUMNS))}")
        renamed[ours] = theirs
    return renamed


def _rename(fields: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    if not renamed:
        return fields
    taken = set(renamed.values()) | set(renamed)
    kept = {name: value for name, value in fields.items() if name not in taken}
    return kept | {ours: fields[theirs] for ours, theirs in renamed.items() if theirs in fields}
