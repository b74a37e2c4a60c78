"""Checkpoints of any pytree (training states, keys, counters) with Orbax, each with hashes to check it by.

    run_dir/checkpoints/<stage>/<step>/arrays/          what Orbax writes
    run_dir/checkpoints/<stage>/<step>/manifest.json    SHA-256 of each file and of each part of the content

A checkpoint appears under its name by one rename, after everything in it was written: never half of one.

    python -m rlhf_jax.checkpoint RUN_DIR               lists them: whole or damaged, and what is in them
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from rlhf_jax.errors import UserError

Tree = TypeVar("Tree")

PARTS = ("params", "opt_state")
"""A field of that name, at any depth, puts what is below it into that part; what is left is `rest`."""


class Checkpoint(NamedTuple):
    """What the listing knows of one checkpoint."""

    stage: str
    step: int
    path: Path
    damage: str | None
    """What is wrong with it, or None when it is whole."""
    sha256: dict[str, str]
    """Of the content of each part that it has: params, opt_state, rest."""
    data_position: dict[str, int]
    data_state: Any = None
    """What the iterator over the data needs to go on, where there is one."""


def save(
    run_dir: str | Path,
    stage: str,
    step: int,
    state: Any,
    *,
    data_position: Mapping[str, int] | None = None,
    data_state: Any = None,
) -> Path:
    """Writes `state` as checkpoint `step` of `stage`, in place of an older one of that number.

    `data_position` says for people where the data stood, such as {"epoch": 2, "row": 640}; by default it is
    the step, for stages whose batches follow from seed and step alone. `data_state` is the JSON value that the
    others' iterator goes on from.
    """
    leaves = {name: _stored(leaf) for name, leaf in _named(state).items()}
    parts: dict[str, Any] = {}
    for name in sorted(leaves):
        array = np.asarray(leaves[name])
        digest = parts.setdefault(_part(name), hashlib.sha256())
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())

    folder = _stage_folder(run_dir, stage)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".*"):  # left by a run that was killed while it wrote
        shutil.rmtree(stale, ignore_errors=True)
    temporary, target, old = folder / f".{step}.new", folder / str(step), folder / f".{step}.old"
    with _quiet_orbax() as checkpointer:
        checkpointer.save(temporary.resolve() / "arrays", leaves)
    content = {
        "stage": stage,
        "step": step,
        "data_position": dict(data_position or {"step": step}),
        "data_state": data_state,
        "sha256": {part: digest.hexdigest() for part, digest in parts.items()},
        "files": {str(path.relative_to(temporary)): _sha256(path) for path in _files(temporary)},
    }
    manifest = {"content": content, "sha256": _content_sha256(content)}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def restore(run_dir: str | Path, stage: str, step: int | None = None, *, like: Tree) -> Tree:
    """The state of checkpoint `step`, or of the last whole one, in the structure and the shardings of `like`.

    Leaves of `like` may be arrays, keys, numbers, or `jax.ShapeDtypeStruct`s with a sharding.
    Raises UserError when there is none, when it is damaged, or when it does not fit `like`.
    """
    if step is None:
        step = latest(run_dir, stage)
        if step is None:
            raise UserError(f"no whole checkpoint of {stage} in {run_dir}")
    found = inspect(run_dir, stage, step)
    if found.damage:
        raise UserError(f"checkpoint {found.path} is damaged: {found.damage}")
    wanted = _named(like)
    with _quiet_orbax() as checkpointer:
        arrays = found.path.resolve() / "arrays"
        stored = checkpointer.metadata(arrays).item_metadata.tree
        _fit(found.path, stored, wanted)
        restore_args = {name: _restore_args(leaf) for name, leaf in wanted.items()}
        values = checkpointer.restore(arrays, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    leaves = [_as(leaf, values[name]) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def latest(run_dir: str | Path, stage: str) -> int | None:
    """The step of the last whole checkpoint of a stage; None when there is none."""
    for step in sorted(_steps(_stage_folder(run_dir, stage)), reverse=True):
        if inspect(run_dir, stage, step).damage is None:
            return step
    return None


def checkpoints(run_dir: str | Path) -> list[Checkpoint]:
    """Every checkpoint of a run, by stage in the order they were written, then by step."""
    root = Path(run_dir) / "checkpoints"
    stages = sorted((path for path in root.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    return [inspect(run_dir, path.name, step) for path in stages for step in sorted(_steps(path))]


def inspect(run_dir: str | Path, stage: str, step: int) -> Checkpoint:
    """Reads a checkpoint's manifest and checks every file against it."""
    path = _stage_folder(run_dir, stage) / str(step)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        content = manifest["content"]
        if manifest["sha256"] != _content_sha256(content):
            return Checkpoint(stage, step, path, "manifest.json was altered", {}, {})
    except FileNotFoundError:
        missing = "manifest.json is missing" if path.exists() else "there is no such checkpoint"
        return Checkpoint(stage, step, path, missing, {}, {})
    except (ValueError, KeyError, TypeError):
        return Checkpoint(stage, step, path, "manifest.json cannot be read", {}, {})
    damage = _damage(path, content["files"])
    return Checkpoint(
        stage, step, path, damage, content["sha256"], content["data_position"], content.get("data_state")
    )


def main(arguments: list[str]) -> int:
    """The listing. Returns the exit code: 1 when a checkpoint is damaged, 2 when there is nothing to list."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m rlhf_jax.checkpoint RUN_DIR", file=sys.stderr)
        return 2
    found = checkpoints(arguments[0])
    if not found:
        print(f"error: no checkpoints in {arguments[0]}", file=sys.stderr)
        return 2
    print(f"{'stage':<14} {'step':>7}  {'state':<8} {'parameters':<14} {'optimiser':<14} data position")
    for one in found:
        state = "damaged" if one.damage else "whole"
        params, optimiser = (one.sha256.get(part, "-")[:12] for part in ("params", "opt_state"))
        position = ", ".join(f"{name} {value}" for name, value in one.data_position.items())
        line = f"{one.stage:<14} {one.step:>7}  {state:<8} {params:<14} {optimiser:<14} {position}"
        print(f"{line}  ({one.damage})" if one.damage else line)
    return 1 if any(one.damage for one in found) else 0


class _quiet_orbax:
    """An Orbax checkpointer whose remarks about its own defaults do not reach the screen."""

    def __enter__(self) -> ocp.Checkpointer:
        self._logger = logging.getLogger("absl")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        return self._checkpointer

    def __exit__(self, *error: object) -> None:
        self._checkpointer.close()
        self._logger.setLevel(self._level)


def _stage_folder(run_dir: str | Path, stage: str) -> Path:
    return Path(run_dir) / "checkpoints" / stage


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as policy.params.embed."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator=".") or "state": leaf for path, leaf in leaves}


def _part(name: str) -> str:
    return next((field for field in name.split(".") if field in PARTS), "rest")


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _fit(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted(stored.keys() ^ wanted.keys()):
        who = "has no" if name in wanted else "has an unexpected"
        raise UserError(f"checkpoint {path} {who} {name}: it was written by another model or optimiser")
    for name, leaf in wanted.items():
        leaf = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        if isinstance(leaf, bool | int | float) and stored[name].shape == ():
            continue  # a counter that starts as a Python number is an array once it went through jit
        have = (tuple(stored[name].shape), np.dtype(stored[name].dtype).name)
        want = (tuple(np.shape(leaf)), np.dtype(getattr(leaf, "dtype", None) or np.asarray(leaf).dtype).name)
        if have != want:
            raise UserError(f"checkpoint {path} has {name} as {have[1]}{have[0]}, not {want[1]}{want[0]}")


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not _is_key(leaf):
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _as(leaf: Any, value: Any) -> Any:
    if _is_key(leaf):
        keys = jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        return jax.device_put(keys, leaf.sharding) if leaf.sharding else keys
    return type(leaf)(value.item()) if isinstance(leaf, bool | int | float) else value


def _files(folder: Path) -> list[Path]:
    return sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damage(path: Path, files: Mapping[str, str]) -> str | None:
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != expected:
            return f"{name} is not what was written"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
