"""A source's rows in one of the forms of `formats`: columns renamed, the form recognised, bad rows rejected."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from rlhf_jax.data.conversations import messages
from rlhf_jax.data.formats import COLUMNS, FORMATS, REWARDED, Prompt, known, normalise, not_read, recognise
from rlhf_jax.data.rejects import BadRow, Place, Rejects, one_line
from rlhf_jax.data.sources import Broken, read_source
from rlhf_jax.errors import UserError

Row = TypeVar("Row")

LOOKED_AT = 1000
"""Rows among which one must have columns that are recognised."""


class Read(NamedTuple):
    """A usable row."""

    number: int
    """Its number in the source, from 0."""
    row: Any
    """One of the forms of `formats`."""
    fields: dict[str, Any]
    """Its columns as they came, under their own names, those that the form does not need too (for rewards)."""
    note: str = ""
    """The columns that nothing reads."""


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
            raise UserError(f"{place}: {one_line(str(error))} by --{kind}-format") from None
        if found is not None:
            return found
        names = one_line(", ".join(sorted(map(str, fields)))) or "(none)"
        reason = reason if " fields " in reason else f"{place}: fields {names}; known {kind} are: {known(kind)}"
    hint = f"; --{kind}-columns NAME=COLUMN gives a column a name" if " fields " in reason else ""
    raise UserError(reason + hint)


def read_rows(
    source: str,
    format: str,
    rejects: Rejects,
    *,
    columns: Sequence[str] = (),
    start: int = 0,
    limit: int | None = None,
    streaming: bool = False,
    order: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Read]:
    """Every usable row of a source from number `start` on, one by one; `rejects` hears of the others.

    `limit` stops at the source's first so many usable rows, those before `start` among them: however often a reader
    goes on from where it stood, it sees the same rows. To count them, it begins to read at the first. `order` is that
    of `read_source`. Of `shard` (number, count) are the rows whose number leaves that number when divided by count.
    Raises UserError when the source itself cannot be read, or under the policy "stop" at the first row that is bad.
    """
    renamed = parse_columns(columns)
    first = start if limit is None else 0
    used = 0
    rows = read_source(source, start=first, streaming=streaming, order=order)
    for number, (place, fields) in enumerate(rows, first):
        wanted = number >= start and number % shard[1] == shard[0]  # those before were counted by who read them
        if not wanted and limit is None:
            continue
        try:
            read = _usable(number, format, fields, renamed, place)
        except BadRow as error:
            if wanted:
                row = fields.text if isinstance(fields, Broken) else fields
                rejects.reject(place, str(error), row, detail=error.detail)
            continue
        used += 1
        if wanted:
            yield read
        if used == limit:
            return


def reported(rows: Iterable[Row], name: str, say: Callable[[str], object], *, every_seconds: float) -> Iterator[Row]:
    """The rows as they come; `say` hears "name: 20,000 rows read" at most once in so many seconds."""
    said = time.monotonic()
    for count, row in enumerate(rows, 1):
        yield row
        now = time.monotonic()
        if now - said >= every_seconds:
            said = now
            say(f"{name}: {count:,} rows read")


def _usable(
    number: int, format: str, fields: dict[str, Any] | Broken, renamed: Mapping[str, str], place: Place
) -> Read:
    if isinstance(fields, Broken):
        raise BadRow(fields.reason)
    for ours in FORMATS[format].columns:
        if renamed.get(ours, ours) not in fields:
            raise BadRow(f"field {renamed.get(ours, ours)!r} is missing")
    named = _rename(fields, renamed)
    rewarded = {ours: named[ours] for ours in renamed if ours in REWARDED and ours in named}
    return Read(number, normalise(format, named, place), {**fields, **rewarded}, not_read(format, named))


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


def as_prompt(read: Read) -> Prompt:
    """The prompt of a row that has answers, too."""
    return Prompt(read.row.prompt, read.row.place, read.row.tools)


def with_suffix(prompt: Prompt, suffix: str) -> Prompt:
    """The prompt with a text behind its last message, in a paragraph of its own."""
    if not suffix:
        return prompt
    *before, last = prompt.prompt
    return prompt._replace(prompt=(*before, {**last, "content": f"{last['content']}\n\n{suffix}"}))


def prompt_text(read: Read, column: str) -> str | list[dict[str, Any]]:
    """A prompt as rewards get it: as it stands in that column of its row, where nothing was put before or behind it.

    Otherwise it is the text of its only message, or else messages.
    """
    given, turns = read.fields.get(column), read.row.prompt
    if isinstance(given, str) and tuple(messages({"prompt": given}, "prompt")) == tuple(turns):
        return given
    alone = len(turns) == 1 and turns[0]["role"] == "user" and isinstance(turns[0]["content"], str)
    return turns[0]["content"] if alone and not isinstance(given, list) else [dict(turn) for turn in turns]
