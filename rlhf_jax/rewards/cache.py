"""Answers that were paid for, in a file: SQLite keeps each as soon as it is there, also when the program is killed."""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError


class Cache:
    """Request -> response, texts both, in a SQLite file. Threads and processes may share it.

    The key is the whole request, any part of which makes another one. Raises UserError for a file that is no such
    cache or cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without isolation level each write is on the disk before `put` returns.
            self._file = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"the cache {self.path} cannot be opened: {error}") from None
        self._run("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, request TEXT, response TEXT)")

    def get(self, request: Mapping[str, Any]) -> str | None:
        """The response to a request; None where there was none so far. Raises UserError for a damaged file."""
        found = self._run("SELECT response FROM answers WHERE key = ?", key(request))
        return found[0][0] if found else None

    def put(self, request: Mapping[str, Any], response: str) -> None:
        """Keeps a response. Raises UserError where the file cannot be written."""
        row = key(request), canonical(request), response
        self._run("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", *row)

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._file.close()

    def _run(self, command: str, *values: str) -> list[Any]:
        try:
            with self._lock:
                return self._file.execute(command, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(
                f"the cache {self.path} cannot be used: {error}; name another file, or take this one away"
            ) from None


def canonical(request: Mapping[str, Any]) -> str:
    """A request as JSON, in one way only."""
    return json.dumps(request, sort_keys=True, ensure_ascii=False)


def key(request: Mapping[str, Any]) -> str:
    """The SHA-256 of a request, in hexadecimal."""
    return hashlib.sha256(canonical(request).encode("utf-8", "surrogatepass")).hexdigest()
