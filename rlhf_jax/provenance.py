"""Where a run came from: the code, the machine's software, and what the run learned from.

Nothing here names the machine. What is shown to others (`card_facts`) names no folder of it either.
"""

import hashlib
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import rlhf_jax
from rlhf_jax.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy")
LARGE = 64 * 2**20
"""Bytes up to which every byte counts in a fingerprint."""
END = 2**20
"""Bytes at each end of a file that count beyond that."""

Source = str | Path
"""A file, a folder, or a name on the hub; files may be followed by :NAME, folders and names by :SPLIT."""


def fingerprint(path: Source) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, or of the files in a folder.

    A folder's hash is that of the names, sizes and contents of its files, at any depth, in sorted order. Hidden files
    and Markdown do not count: no model and no data are in them. Where the bytes are more than 64 MiB in all, each file
    counts by its size, its first and its last MiB: an 8B model costs nothing, and a change in the middle of a large
    file that leaves its size as it is goes unseen. Raises UserError for what cannot be read.
    """
    path = Path(path)
    files = _files(path) if path.is_dir() else [path]
    digest = hashlib.sha256()
    try:
        sizes = {file: file.stat().st_size for file in files}
        for file in files:
            if path.is_dir():
                digest.update(f"{file.relative_to(path).as_posix()} {sizes[file]}\n".encode())
            _add(digest, file, sizes[file], whole=sum(sizes.values()) <= LARGE)
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}") from None
    return {"bytes": sum(sizes.values()), "sha256": digest.hexdigest()}


def inputs(given: Mapping[str, Source | Sequence[Source] | None]) -> dict[str, list[dict[str, Any]] | None]:
    """Each input's sources: name, and the fingerprint of those that are on the disk. None stays None."""
    return {name: None if found is None else [_source(one) for one in _listed(found)] for name, found in given.items()}


def changed_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each input of `now` that `before` has, but otherwise. A copy in another place is the same."""
    return [
        f"{name} is not what the run was begun with ({_named(before[name])}, and now {_named(now[name])})"
        for name in sorted(before.keys() & now.keys())
        if _content(before[name]) != _content(now[name])
    ]


def begin_session() -> dict[str, Any]:
    """The facts of a process that starts to work on a run: command line, commit, versions, devices, time (UTC)."""
    devices = jax.devices()
    return {
        "start": _now(),
        "end": None,
        "status": "running",
        "command": shlex.join(sys.argv),
        **commit(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {"rlhf_jax": rlhf_jax.__version__, **versions(PACKAGES)},
    }


def end_session(session: Mapping[str, Any], status: str) -> dict[str, Any]:
    """The session with its end."""
    return {**session, "end": _now(), "status": status}


def commit(package: str | Path = rlhf_jax.__file__) -> dict[str, Any]:
    """Git commit of the checkout that holds the package, and whether its Python files are those of the commit.

    Both are None where the package is in no checkout, or git is not there.
    """
    file = Path(package).resolve()
    unknown = {"commit": None, "clean": None}
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:  # some other repository around it
        return unknown
    head, top = _git(file.parent, "rev-parse", "HEAD"), _git(file.parent, "rev-parse", "--show-toplevel")
    if not head or not top:
        return unknown
    changes = _git(Path(top), "status", "--porcelain", "--", "*.py")
    return {"commit": head, "clean": None if changes is None else not changes}


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of installed packages; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def card_facts(run: Mapping[str, Any]) -> dict[str, str]:
    """Lines of a model card from a run.json: who made it, commit, versions, devices, counts of data, inputs."""
    sessions = run.get("sessions") or [{}]
    last = sessions[-1]
    packages = {name: version for name, version in (last.get("packages") or {}).items() if version}
    made_by = (run.get("experiment"), f"rlhf_jax {packages.pop('rlhf_jax', '')}".strip())
    learned_from = {name: _named(found) for name, found in (run.get("inputs") or {}).items() if found}
    facts = {
        "Made by": " of ".join(filter(None, made_by)),
        "Commit": commit_in_words(last),
        "Versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "Devices": last.get("devices") or "",
        "Counts of data": in_words(run.get("data") or {}),
        "Learned from": "; ".join(f"{name}: {text}" for name, text in learned_from.items()),
    }
    return {name: text for name, text in facts.items() if text}


def commit_in_words(session: Mapping[str, Any]) -> str:
    """The commit, and whether the files were other ones; empty where it is not known."""
    if not session.get("commit"):
        return ""
    return session["commit"] + ("" if session.get("clean") else ", with changes that are not in it")


def in_words(value: Any) -> str:
    """A JSON value on one line; names that are paths lose their folders."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{shown_name(name)} ({in_words(x)})" if isinstance(x, Mapping) else f"{shown_name(name)}: {in_words(x)}"
            for name, x in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(in_words, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def shown_name(source: Source) -> str:
    """A source as others may see it: a name on the hub whole, of a path only its last part."""
    text = str(source)
    on_disk = _path(text) is not None or text.startswith(("/", "~", ".")) or not re.fullmatch(r"[^/]+/[^/]+", text)
    return Path(text).name if on_disk and "/" in text else text


def _listed(found: Source | Sequence[Source]) -> Sequence[Source]:
    return [found] if isinstance(found, str | Path) else found


def _source(source: Source) -> dict[str, Any]:
    path = _path(str(source))
    return {"name": str(source)} | ({} if path is None else fingerprint(path))


def _path(text: str) -> Path | None:
    """The file or folder of a name that is on the disk."""
    for name in (text, text.rpartition(":")[0]):
        if name and Path(name).expanduser().exists():
            return Path(name).expanduser()
    return None


def _content(sources: Sequence[Mapping[str, Any]] | None) -> list[str] | None:
    return None if sources is None else [one.get("sha256", one["name"]) for one in sources]


def _named(sources: Sequence[Mapping[str, Any]] | None) -> str:
    if sources is None:
        return "none"
    return ", ".join(
        shown_name(one["name"]) + (f" with SHA-256 {one['sha256'][:12]}" if "sha256" in one else "") for one in sources
    )


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() != ".md"
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _add(digest: Any, file: Path, size: int, *, whole: bool) -> None:
    with open(file, "rb") as stream:
        if whole or size <= 2 * END:
            while block := stream.read(END):
                digest.update(block)
        else:
            digest.update(stream.read(END))
            stream.seek(-END, 2)
            digest.update(stream.read(END))


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; None when git refuses or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
