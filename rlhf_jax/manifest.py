"""The manifest of a checkpoint's folder, and whether every file is as the manifest has it."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Checkpoint(NamedTuple):
    """One checkpoint, as its manifest has it."""

    stage: str
    step: int
    path: Path
    damage: str | None
    """The fault that was found, or None when it is whole."""
    sha256: dict[str, str]
    """The hash of the content of each part that it has: params, opt_state, rest."""
    data_position: dict[str, int]
    data_state: Any = None
    """The state of the iterator over the data, from which it goes on; None where there is no iterator."""
    metric: float | None = None
    """How good it is, the larger the better, where that was measured."""


def inspect(run_dir: str | Path, stage: str, step: int, *, files: bool = True) -> Checkpoint:
    """Reads a checkpoint's manifest and checks every file against it, unless `files` is False."""
    path = stage_folder(run_dir, stage) / str(step)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        content = manifest["content"]
        if manifest["sha256"] != sha256_of_content(content):
            return Checkpoint(stage, step, path, "manifest.json was altered", {}, {})
    except FileNotFoundError:
        missing = "manifest.json is missing" if path.exists() else "there is no such checkpoint"
        return Checkpoint(stage, step, path, missing, {}, {})
    except (ValueError, KeyError, TypeError, OSError):
        return Checkpoint(stage, step, path, "manifest.json cannot be read", {}, {})
    damage = _damage(path, content["files"]) if files else None
    return Checkpoint(
        stage, step, path, damage, content["sha256"], content["data_position"], content.get("data_state"),
        content.get("metric"),
    )  # fmt: skip


def stage_folder(run_dir: str | Path, stage: str) -> Path:
    """The folder of a stage's checkpoints."""
    return Path(run_dir) / "checkpoints" / stage


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a stage's folder, in no order."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and in those inside it, sorted."""
    return sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names)


def sha256_of_file(path: Path) -> str:
    """The hash of a file, in hexadecimal digits. Raises OSError when it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_content(content: Any) -> str:
    """The hash of a JSON value, in hexadecimal digits; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damage(path: Path, files: Mapping[str, str]) -> str | None:
    for name, expected in files.items():
        try:
            if sha256_of_file(path / name) != expected:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None
