"""A run's metrics.jsonl: a line a step, in the same order and the same words however often the run was resumed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLOCKS = ("time", "seconds", "tokens_per_second", "compilations")
"""Metrics that tell of the machine: all others are the same in each run of the same flags, however often resumed."""


class MetricsFile:
    """Opened to go on: a line that a kill has torn is cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found = _lines(path)
        self._file = open(path, "a", encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> bool:
        """Writes a row (at least stage and step) to the disk; False if it is there from before."""
        if (row["stage"], row["step"]) in self._found:
            return False
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        return True

    def rewind(self, stage: str, step: int) -> None:
        """Takes out what a stage wrote after `step`, so that it may be written again."""
        self._found = _lines(self._path)
        kept = {key: line for key, line in self._found.items() if key[0] != stage or key[1] <= step}
        if len(kept) < len(self._found):
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(kept.values()), encoding="utf-8")
            self._file.close()
            temporary.replace(self._path)
            self._file = open(self._path, "a", encoding="utf-8")
            self._found = kept

    def close(self) -> None:
        self._file.close()


def read_metrics(run_dir: str | Path) -> dict[str, list[dict[str, Any]]]:
    """metrics.jsonl by stage, in order of steps.

    The last line counts where a resumed run wrote a step again; a line torn by a kill is passed over.
    """
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    path = Path(run_dir) / "metrics.jsonl"
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                stages.setdefault(row["stage"], {})[row["step"]] = row
            except (ValueError, KeyError, TypeError):
                continue
    return {stage: [rows[step] for step in sorted(rows)] for stage, rows in stages.items()}


def _lines(path: Path) -> dict[tuple[str, int], str]:
    """By stage and step, in their order."""
    lines: dict[tuple[str, int], str] = {}
    if path.exists():
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(path, len(whole))
        for line in whole.decode("utf-8", errors="replace").splitlines(keepends=True):
            try:
                row = json.loads(line)
                lines[row["stage"], row["step"]] = line
            except (ValueError, KeyError, TypeError):
                continue
    return lines
