"""The time that chat templates are told. A run keeps the one that it began at, and so reads the same on any day."""

from datetime import datetime

_kept: list[datetime] = []


def now() -> datetime:
    """The time that was kept, else the machine's."""
    return _kept[-1] if _kept else datetime.now()


def keep(moment: str | None) -> str:
    """From now on it is `moment`, in ISO format, or this very second; returns it. `release` ends that."""
    _kept.append(datetime.now().replace(microsecond=0) if moment is None else datetime.fromisoformat(moment))
    return _kept[-1].isoformat()


def release() -> None:
    """Ends the last `keep`."""
    _kept.pop()
