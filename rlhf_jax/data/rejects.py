"""Rows that cannot be used: where they stand, why, and whether that stops the run or is counted and written down."""

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_jax.errors import UserError

SHOWN = 5
"""Line numbers that a summary names for each reason."""
PENDING = 1000
"""Rejected rows that are kept until they have a file; of others only the counts."""
LONGEST = 4000
"""Characters of a rejected row that are written down."""

OnBadRow = Literal["stop", "skip"]


class Place(NamedTuple):
    """Where a row stands: a file and its line, or a Hub set's split and its row, from 1."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


class BadRow(Exception):
    """Why one row cannot be used. It becomes a UserError or a count, never a traceback.

    Rows are counted by the reason; `detail` is what only this row has, such as its number of tokens.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


class _Count(NamedTuple):
    rows: int
    lines: tuple[int, ...]


class Rejects:
    """Tells and counts the rows that are not used as they stand.

    `reject` raises a UserError with place and reason under the policy "stop"; under "skip" it counts the row and
    keeps it for rejected.jsonl. `note` counts a row that is used, but changed (a prompt made shorter).
    """

    def __init__(self, policy: OnBadRow = "stop"):
        self.policy = policy
        self.used: dict[str, int] = {}
        """Source -> rows that became something to learn from."""
        self._rejected: dict[tuple[str, str], _Count] = {}
        self._noted: dict[tuple[str, str], _Count] = {}
        self._pending: list[dict[str, Any]] = []
        self._seen: set[Place] = set()
        self._path: Path | None = None

    def reject(self, place: Place, reason: str, row: Any, *, detail: str = "") -> None:
        """Counts the row, once, or raises UserError with "source:line: reason: detail" under the policy "stop"."""
        reason, detail = one_line(reason), one_line(detail)
        if self.policy == "stop":
            whole = f"{reason}: {detail}" if detail else reason
            raise UserError(f"{place}: {whole} (--on-bad-row=skip leaves such rows out and counts them)")
        if place in self._seen:
            return
        self._seen.add(place)
        _add(self._rejected, place, reason)
        entry = {"source": place.source, "line": place.line, "reason": reason, "row": _text(row)[:LONGEST]}
        if detail:
            entry["detail"] = detail
        if self._path is None:
            if len(self._pending) < PENDING:  # the others are counted only
                self._pending.append(entry)
        else:
            _append(self._path, [entry])

    def note(self, place: Place, reason: str) -> None:
        """Counts a row that is used, but not as it stands."""
        _add(self._noted, place, one_line(reason))

    def use(self, place: Place) -> None:
        """Counts a row that is used."""
        self.used[place.source] = self.used.get(place.source, 0) + 1

    def changes(self) -> dict[str, Any]:
        """The counts of rows that are used, and of those among them that were changed, as JSON values for `add`."""
        noted = [[source, reason, count.rows, count.lines] for (source, reason), count in list(self._noted.items())]
        return {"used": self.used, "noted": noted}

    def add(self, changes: dict[str, Any]) -> None:
        """Counts what another one's `changes` tell."""
        for source, rows in changes["used"].items():
            self.used[source] = self.used.get(source, 0) + rows
        for source, reason, rows, lines in changes["noted"]:
            before = self._noted.get((source, reason), _Count(0, ()))
            shown = (*before.lines, *lines)[:SHOWN]
            self._noted[source, reason] = _Count(before.rows + rows, shown)

    def told(self) -> dict[str, Any]:
        """All that another one has to `hear`, as JSON values, where nothing is written to a file."""
        counts = [[source, reason, count.rows] for (source, reason), count in list(self._rejected.items())]
        return {**self.changes(), "rejected": self._pending, "counts": counts}

    def forget(self) -> None:
        """Begins to count anew, after all was told; a row that was left out is not told a second time."""
        self.used, self._rejected, self._noted, self._pending = {}, {}, {}, []

    def hear(self, told: dict[str, Any]) -> None:
        """Counts what another one's `told` tells."""
        for entry in told["rejected"]:
            place = Place(entry["source"], entry["line"])
            self.reject(place, entry["reason"], entry["row"], detail=entry.get("detail", ""))
        shown = Counter((entry["source"], entry["reason"]) for entry in told["rejected"])
        for source, reason, rows in told.get("counts", ()):
            before, more = self._rejected.get((source, reason), _Count(0, ())), rows - shown[source, reason]
            if more > 0:
                self._rejected[source, reason] = before._replace(rows=before.rows + more)
        self.add(told)

    def write_to(self, path: str | Path, *, sources: Collection[str] | None = None) -> None:
        """Rejected rows go into this jsonl file: those so far at once, later ones as they come.

        What a resumed run wrote there before is kept, and counted once; only what is of these `sources`, if they are
        given. Without rejected rows there is no file.
        """
        self._path = Path(path)
        before = set()
        if self._path.exists():
            content = self._path.read_text(encoding="utf-8")
            if content and not content.endswith("\n"):
                self._path.write_text(
                    content + "\n", encoding="utf-8"
                )  # torn by a kill: the next entry gets its own line
            for line in content.splitlines():
                try:
                    entry = json.loads(line)
                    place = Place(entry["source"], entry["line"])
                except (ValueError, KeyError, TypeError):
                    continue
                before.add(place)
                if place not in self._seen and (sources is None or place.source in sources):
                    self._seen.add(place)
                    _add(self._rejected, place, entry["reason"])
        _append(self._path, [e for e in self._pending if Place(e["source"], e["line"]) not in before])
        self._pending = []

    def counts(self) -> dict[str, int]:
        """Reason -> rejected rows, over all sources."""
        totals: dict[str, int] = {}
        for (_, reason), count in list(self._rejected.items()):
            totals[reason] = totals.get(reason, 0) + count.rows
        return totals

    def notes(self) -> dict[str, int]:
        """Reason -> rows that were changed, over all sources."""
        totals: dict[str, int] = {}
        for (_, reason), count in list(self._noted.items()):
            totals[reason] = totals.get(reason, 0) + count.rows
        return totals

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Counts of every source's rows, as JSON values: {"read", "used", "left_out", "changed"} by source.

        "left_out" and "changed" are rows by reason; rows that are used or left out were read.
        """
        found = {}
        for source in self._sources():
            left_out, changed = (
                {reason: count.rows for (name, reason), count in list(counted.items()) if name == source}
                for counted in (self._rejected, self._noted)
            )
            used = self.used.get(source, 0)
            read = used + sum(left_out.values())
            found[source] = {"read": read, "used": used, "left_out": left_out, "changed": changed}
        return found

    def _sources(self) -> list[str]:
        """Every source that a row came from, once."""
        return list(dict.fromkeys([*self.used, *(s for s, _ in self._rejected), *(s for s, _ in self._noted)]))

    def summary(self) -> list[str]:
        """Lines for people: what was used of each source and, reason by reason, what was not or was changed."""
        lines = []
        for source in self._sources():
            lines.append(f"{source}: {self.used.get(source, 0)} rows used")
            for counted, word in ((self._rejected, "rows left out"), (self._noted, "rows")):
                for (name, reason), count in list(counted.items()):
                    if name == source:
                        some = ", ".join(map(str, count.lines)) + (", …" if count.rows > SHOWN else "")
                        lines.append(f"{source}: {reason}: {count.rows} {word} (lines {some})")
        return lines


def _text(row: Any) -> str:
    if isinstance(row, str):
        return row
    try:
        return json.dumps(row, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        return f"(cannot be written as JSON: {error})"


def _append(path: Path, entries: list[dict[str, Any]]) -> None:
    if entries:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)


def _add(counted: dict[tuple[str, str], _Count], place: Place, reason: str) -> None:
    before = counted.get((place.source, reason), _Count(0, ()))
    lines = before.lines if before.rows >= SHOWN else (*before.lines, place.line)
    counted[place.source, reason] = _Count(before.rows + 1, lines)


def one_line(text: str) -> str:
    """A text for a message: on one line, and not longer than a reader would read."""
    return " ".join(text.split())[:300]
