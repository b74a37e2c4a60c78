"""Compiled programs: kept on the disk for the runs that follow, counted, and said where one takes long."""

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from rlhf_jax.errors import UserError

TRACED, LOWERED, COMPILED = (
    f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)
LONG = 5.0
"""Seconds from which on a compilation is said when it is done; it is announced where its tracing takes a tenth."""
LARGEST = 4 * 2**30
"""Bytes of programs that are kept; those that were used least recently go."""


def keep_compiled(folder: str | None) -> None:
    """Has JAX keep compiled programs in a folder, so that a later run with equal shapes compiles nothing.

    None is the folder that JAX was told (JAX_COMPILATION_CACHE_DIR), else rlhf_jax/ in the user's cache folder;
    "none" keeps nothing. Raises UserError for a folder that cannot be written.
    """
    if folder == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder is None and jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    path = default_folder() if folder is None else Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        if folder is None:
            return  # a home that is read-only: nothing is kept, as before
        raise UserError(f"--compile-cache: {path} is no folder that can be written")
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def default_folder() -> Path:
    """In the user's cache folder, one for each kind of processor: a program is made for its instructions."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        flags = next((line for line in said.splitlines() if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    kind = hashlib.sha256(flags.encode()).hexdigest()[:8]
    return Path(root).expanduser() / "rlhf_jax" / f"{platform.machine()}-{kind}"


@contextmanager
def long_compilations_said(say: Callable[[str], None]) -> Iterator[None]:
    """Has `say` told of each program that takes long to compile, while the `with` lasts."""
    traced: dict[str, float] = {}

    def listener(event: str, duration_secs: float, **of: str | int) -> None:
        name = str(of.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
        if event == TRACED:
            traced[name] = duration_secs
        elif event == LOWERED:
            traced[name] = traced.get(name, 0.0) + duration_secs
            if traced[name] > LONG / 10:
                say(f"compiling {name} …")
        elif event == COMPILED:
            whole = traced.pop(name, 0.0) + duration_secs
            if whole > LONG:
                say(f"compiled {name} in {whole:.0f} s")

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@contextmanager
def count_compilations() -> Iterator[Callable[[], int]]:
    """Yields a function: how many programs JAX has compiled (or read from its cache) so far."""
    count = 0

    def listener(event: str, duration_secs: float, **kwargs: str | int) -> None:
        nonlocal count
        count += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield lambda: count
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
