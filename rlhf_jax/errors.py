"""Errors that a user can put right, as opposed to faults of the program."""

from typing import Any


class UserError(Exception):
    """Shown as its one line, without a traceback: it says what is wrong and what to do."""


def at_least(cfg: Any, **bounds: float | int) -> None:
    """Raises UserError for the first of cfg's fields that is below its bound (or not a number at all)."""
    for name, bound in bounds.items():
        value = getattr(cfg, name)
        if not value >= bound:
            raise UserError(f"{name.replace('_', '-')} is {value}; it must be at least {bound}")


def first_line(error: BaseException) -> str:
    """One line of an error of another library: its words, or its type where it has none."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
