"""A run's folder: it is opened once, and it goes on only as the run that it was begun as."""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError

UNLEARNED = {
    "run_dir", "resume", "hosts", "mesh", "accept_changes", "track", "jobs", "save_every", "keep", "max_skipped",
    "compile_cache", "scan_layers", "remat", "judge_key", "judge_cache", "judge_at_once", "judge_max_requests",
    "judge_time_limit", "judge_max_failed", "rows_cache", "num_proc",
}  # fmt: skip
"""Flags that change nothing of what is learned: a resumed run may have others, at any depth."""
OWN = ("*.json", "*.jsonl", "*.html", "tensorboard", "wandb")
"""The files that a run has written before it begins to train."""


def open_folder(run_dir: str | Path | None, name: str, resume: bool) -> tuple[str, int]:
    """The run's folder, and how many levels of its path were made; None takes the next free runs/<name>-<n>.

    Raises UserError for a folder in use without `resume`, for one that is no run with it, and for one that cannot be
    made.
    """
    if run_dir is None:
        if resume:
            raise UserError("--resume needs --run-dir: which run is to go on?")
        return _fresh_folder(name)
    folder = Path(run_dir)
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if used and not folder.is_dir():
        raise UserError(f"{folder} is a file; --run-dir wants a folder")
    if used and not resume:
        raise UserError(f"{folder} already holds something: take another --run-dir, or --resume that run")
    if resume and not (folder / "config.json").exists():
        raise UserError(f"there is no run to resume in {folder} (it has no config.json)")
    made = _missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run's folder {folder} cannot be made: {error.strerror}") from None
    return str(folder), made


def remove_folder(folder: Path, *, made: int) -> None:
    """Leaves the place as it was before a run that did nothing: the last `made` levels of the path go.

    A folder that was there before is emptied of what such a run has written; what another run uses by now stays.
    """
    for path in [path for pattern in OWN for path in folder.glob(pattern)] if not made else [folder]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    with suppress(OSError):
        for parent in list(folder.parents)[: max(0, made - 1)]:
            parent.rmdir()


def changed_flags(folder: Path, name: str, config: Mapping[str, Any]) -> list[str]:
    """A line for each flag that another session of the run had otherwise, but for those of UNLEARNED.

    Raises UserError unless the folder's config.json says that it is a run of the experiment `name`.
    """
    before = read_json(folder / "config.json")
    if "experiment" not in before:
        raise UserError(
            f"{folder / 'config.json'} names no experiment: an older version of rlhf_jax wrote it, or it is damaged;"
            " the run cannot be resumed, take another --run-dir"
        )
    if before["experiment"] != name:
        raise UserError(
            f"{folder} is a run of the experiment {before['experiment']}, which {name} cannot resume: take another"
            f" --run-dir, or resume it with {before['experiment']}"
        )
    old, new = flat(before), flat(config)
    flags = sorted((old.keys() | new.keys()) - {"experiment", "version", "date"})
    return [
        f"--{flag.replace('_', '-')} was {old.get(flag, 'not there')} and is {new.get(flag, 'not there')} now"
        for flag in flags
        if old.get(flag) != new.get(flag) and flag.rpartition(".")[2] not in UNLEARNED
    ]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, so that a kill leaves the older file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested objects by their path, as in sft.learning_rate."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def _fresh_folder(name: str) -> tuple[str, int]:
    number = 1
    while True:
        folder = Path("runs") / f"{name}-{number}"
        made = _missing(folder)
        try:
            folder.mkdir(parents=True)
            return str(folder), made
        except FileExistsError:  # also when another run took it this very moment
            number += 1


def _missing(folder: Path) -> int:
    return sum(not path.exists() for path in (folder, *folder.parents))
