"""The time that chat templates are told. A run keeps the one that it began at, and so reads the same on any day."""

from datetime import datetime

_kept: list[datetime] = []


def now() -> datetime:
    """The time that is kept, else the machine's."""
    return _kept[-1] if _kept else datetime.now()


def now_text() -> str:
    """The same in ISO format, to the second."""
    return now().isoformat(timespec="seconds")


def keep(moment: str) -> None:
    """From now on it is `moment`, in ISO format, until `release`. Runs inside a run each keep their own."""
    _kept.append(datetime.fromisoformat(moment))


def release() -> None:
    """Ends the last `keep`."""
    _kept.pop()
