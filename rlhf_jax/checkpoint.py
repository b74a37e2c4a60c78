"""Checkpoints of any pytree (training states, keys, counters) with Orbax, each with hashes to check it by.

    run_dir/checkpoints/<stage>/<step>/arrays/          what Orbax writes
    run_dir/checkpoints/<stage>/<step>/manifest.json    SHA-256 of each file and of each part of the content

A checkpoint appears under its name by one rename, after everything in it was written, and goes by one: never half of
one. A damaged one is neither deleted nor written over: a run that goes on renames it to <step>.damaged.

    python -m rlhf_jax.checkpoint RUN_DIR               lists them: whole or damaged, and what is in them
"""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.manifest import (
    Checkpoint,
    files_in,
    inspect,
    sha256_of_content,
    sha256_of_file,
    stage_folder,
    steps_in,
)

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Tree = TypeVar("Tree")

PARTS = ("params", "opt_state")
"""A field of that name, at any depth, puts what is below it into that part; what is left is `rest`."""
CHUNK = 1 << 26
"""Bytes of an array that are stored together, so that a device need not read what it has no part of."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save(
    run_dir: str | Path,
    stage: str,
    step: int,
    state: Any,
    *,
    keep: int | None = None,
    metric: float | int | None = None,
    data_position: Mapping[str, int] | None = None,
    data_state: Any = None,
) -> Path:
    """Writes `state` as checkpoint `step` of `stage`, in place of an older one of that number.

    With `keep`, of the stage's checkpoints up to this one the last `keep` stay and the one of the best `metric` (the
    larger the better). `data_position` says for people where the data stood, such as {"epoch": 2, "row": 640}; by
    default it is the step, for stages whose batches follow from seed and step alone. `data_state` is the JSON value
    that the others' iterator goes on from. Raises UserError when there is no room for it: older ones stay as they are.
    """
    content = _content(stage, step, metric, data_position, data_state)
    return _begin(stage_folder(run_dir, stage), step, state, content, keep)()


class Writer:
    """Writes checkpoints while training goes on, one at a time.

    `save` waits for the one before, copies the state to the host, so that it may be donated, and leaves the rest to a
    thread. What went wrong there is raised by the next `save`, by `wait` or by `close`.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None

    def save(
        self,
        stage: str,
        step: int,
        state: Any,
        *,
        keep: int | None = None,
        metric: float | int | None = None,
        data_position: Mapping[str, int] | None = None,
        data_state: Any = None,
    ) -> None:
        """Does what the function `save` does; returns as soon as the state is copied."""
        self.wait()
        content = _content(stage, step, metric, data_position, data_state)
        finish = _begin(stage_folder(self._run_dir, stage), step, state, content, keep)
        self._pending = self._thread.submit(finish)

    def wait(self) -> None:
        """Until the last one is written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def restore(run_dir: str | Path, stage: str, step: int | None = None, *, like: Tree) -> Tree:
    """The state of checkpoint `step`, or of the last whole one, in the structure and the shardings of `like`.

    Leaves of `like` may be arrays, keys, numbers, or `jax.ShapeDtypeStruct`s. An array that is bound to no device, or
    a struct without a sharding, comes back bound to none: to jit, one that is bound is another argument, for which it
    compiles anew.
    Raises UserError when there is none, when it is damaged, or when it does not fit `like`.
    """
    import orbax.checkpoint as ocp

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


def latest(run_dir: str | Path, stage: str, *, before: int | float = math.inf) -> int | None:
    """The step of the last whole checkpoint of a stage, or of the last before a step; None when there is none."""
    steps = sorted((step for step in steps_in(stage_folder(run_dir, stage)) if step < before), reverse=True)
    return next((step for step in steps if inspect(run_dir, stage, step).damage is None), None)


def set_aside_damaged(run_dir: str | Path, stage: str) -> list[str]:
    """Renames the damaged checkpoints of a stage to <step>.damaged, out of the way; returns a line about each."""
    folder = stage_folder(run_dir, stage)
    lines = []
    for step in sorted(steps_in(folder)):
        found = inspect(run_dir, stage, step)
        if found.damage:
            number, aside = 1, folder / f"{step}.damaged"
            while aside.exists():
                number, aside = number + 1, folder / f"{step}.damaged-{number + 1}"
            if jax.process_index() == 0:
                found.path.rename(aside)
            lines.append(f"checkpoint {found.path} is damaged, {found.damage}; it is now {aside.name}")
    return lines


def checkpoints(run_dir: str | Path) -> list[Checkpoint]:
    """Every checkpoint of a run, by stage in the order they were written, then by step."""
    root = Path(run_dir) / "checkpoints"
    stages = sorted((path for path in root.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    return [inspect(run_dir, path.name, step) for path in stages for step in sorted(steps_in(path))]


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

    def __enter__(self) -> "ocp.Checkpointer":
        import orbax.checkpoint as ocp

        self._logger = logging.getLogger("absl")
        self._level = self._logger.level
        self._logger.setLevel(logging.CRITICAL)  # errors are raised, too
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        return self._checkpointer

    def __exit__(self, *error: object) -> None:
        self._checkpointer.close()
        self._logger.setLevel(self._level)


def _content(
    stage: str, step: int, metric: float | int | None, data_position: Mapping[str, int] | None, data_state: Any
) -> dict[str, Any]:
    return {
        "stage": stage,
        "step": step,
        "metric": None if metric is None or not math.isfinite(metric) else float(metric),
        "data_position": dict(data_position or {"step": step}),
        "data_state": data_state,
    }


def _begin(folder: Path, step: int, state: Any, content: dict[str, Any], keep: int | None) -> Callable[[], Path]:
    """Copies the state; returns what is left to do, which may be done in a thread.

    Of many processes each writes what it holds; process 0 does what is done once. They meet here and inside of Orbax.
    """
    import orbax.checkpoint as ocp

    leaves = {name: _stored(leaf) for name, leaf in _named(state).items()}
    for leaf in leaves.values():
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()
    leaves = {name: _copied(leaf) for name, leaf in leaves.items()}
    first = jax.process_index() == 0
    temporary, target, old = folder / f".{step}.new", folder / str(step), folder / f".{step}.old"
    arrays = temporary.resolve() / "arrays"
    args = ocp.args.PyTreeSave(leaves, save_args={name: ocp.SaveArgs(chunk_byte_size=CHUNK) for name in leaves})
    writing = None
    with _in_one_line(target, temporary):
        folder.mkdir(parents=True, exist_ok=True)
        if first:
            for stale in folder.glob(".*"):  # left by a run that was killed while it wrote or deleted
                shutil.rmtree(stale, ignore_errors=True)
        if jax.process_count() > 1:
            writing = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            writing.save(arrays, args=args)

    def finish() -> Path:
        with _in_one_line(target, temporary):
            if writing is not None:
                writing.close()  # waits for all processes
            else:
                with _quiet_orbax() as checkpointer:
                    checkpointer.save(arrays, args=args)
            if first:
                content["sha256"] = _sha256_of_parts(arrays, leaves)
                content["files"] = {
                    str(path.relative_to(temporary)): sha256_of_file(path) for path in files_in(temporary)
                }
                manifest = {"content": content, "sha256": sha256_of_content(content)}
                (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
                _to_disk(temporary)
                if target.exists():
                    target.rename(old)
                temporary.rename(target)
                shutil.rmtree(old, ignore_errors=True)
                if keep is not None:
                    _delete_older(folder, step, keep)
        return target

    return finish


def _delete_older(folder: Path, step: int, keep: int) -> None:
    """Leaves the last `keep` up to `step`, the best, and what is damaged."""
    run_dir, stage = folder.parents[1], folder.name
    found = [inspect(run_dir, stage, s, files=False) for s in sorted(steps_in(folder)) if s <= step]
    best = max((one.metric for one in found if one.metric is not None), default=None)
    last_best = max((one.step for one in found if best is not None and one.metric == best), default=None)
    for one in found[:-keep]:
        if one.step != last_best and not inspect(run_dir, stage, one.step).damage:
            gone = folder / f".{one.step}.old"
            one.path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def _in_one_line(target: Path, temporary: Path) -> Iterator[None]:
    """Turns an error of the disk into a UserError of one line, and deletes what was written so far."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # The storage below Orbax has errors of its own, with the system's words in them.
        reasons = [os.strerror(number) for number in NO_ROOM if os.strerror(number) in str(error)]
        if isinstance(error, OSError) and error.strerror:
            reasons = [error.strerror]
        if not reasons:
            raise
        message = f"checkpoint {target} was not written: {reasons[0]}; those before it are whole, --resume goes on"
        raise UserError(message) from error


def _to_disk(folder: Path) -> None:
    """Before it gets its name, so that a loss of power leaves no name with nothing behind it."""
    for path in [*files_in(folder), *(Path(root) for root, _, _ in os.walk(folder))]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _copied(leaf: Any) -> Any:
    """On the host and its own; where this process has only a part of it, still an array of all devices."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.array(leaf)
    if leaf.is_fully_replicated:
        return np.array(leaf.addressable_data(0))
    if leaf.addressable_shards[0].device.platform != "cpu":
        return leaf  # which Orbax copies before it returns; on a CPU it takes a view
    shards = [jax.device_put(np.array(shard.data), shard.device) for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _sha256_of_parts(arrays: Path, leaves: Mapping[str, Any]) -> dict[str, str]:
    """However an array is sharded; one that is not all here is read back from what all processes wrote."""
    parts: dict[str, Any] = {}
    for name in sorted(leaves):
        array = leaves[name] if isinstance(leaves[name], np.ndarray) else _read_array(arrays, name)
        digest = parts.setdefault(_part(name), hashlib.sha256())
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return {part: digest.hexdigest() for part, digest in parts.items()}


def _read_array(arrays: Path, name: str) -> np.ndarray:
    import tensorstore

    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{arrays}/"}, "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result().read().result()


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
        apart = any("layer_0." in field for field in stored) != any("layer_0." in field for field in wanted)
        hint = "; of the same model, with --scan-layers otherwise than now" if apart else ""
        raise UserError(f"checkpoint {path} {who} {name}: it was written by another model or optimiser{hint}")
    for name, leaf in wanted.items():
        leaf = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        if isinstance(leaf, bool | int | float) and stored[name].shape == ():
            continue  # a counter that starts as a Python number is an array once it went through jit
        have = (tuple(stored[name].shape), np.dtype(stored[name].dtype).name)
        want = (tuple(np.shape(leaf)), np.dtype(getattr(leaf, "dtype", None) or np.asarray(leaf).dtype).name)
        if have != want:
            raise UserError(f"checkpoint {path} has {name} as {have[1]}{have[0]}, not {want[1]}{want[0]}")


def _restore_args(leaf: Any) -> "ocp.RestoreArgs":
    import orbax.checkpoint as ocp

    if (sharding := bound_to(leaf)) is not None and not _is_key(leaf):
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def bound_to(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding of an array that is bound to its devices, or of a struct that has one."""
    unbound = isinstance(leaf, jax.Array) and not leaf.committed
    return None if unbound else getattr(leaf, "sharding", None)


def _as(leaf: Any, value: Any) -> Any:
    if _is_key(leaf):
        keys = jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        return keys if bound_to(leaf) is None else jax.device_put(keys, leaf.sharding)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and bound_to(leaf) is None:
        return jax.device_put(value, may_alias=False)
    if isinstance(value, jax.Array) and all(device.platform == "cpu" for device in value.devices()):
        # Here it may be a view of what Orbax read, in whose place a step that it is donated to could put nothing.
        return jax.device_put(value, value.sharding, may_alias=False)
    return type(leaf)(value.item()) if isinstance(leaf, bool | int | float) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
