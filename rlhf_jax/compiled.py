"""Compiled programs: kept on the disk for the runs that follow, counted, and said where one takes long."""

import hashlib
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from rlhf_jax.errors import UserError
from rlhf_jax.hosts import many

TRACED, LOWERED, COMPILED = (
    f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)
LONG = 5.0
"""Seconds from which on a compilation is said when it is done."""
WAIT = 1.5
"""Seconds after which it is said that a program is compiled; one that is in the cache is read by then."""
SHORT, TOLD = 0.5, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
"""Seconds: what compiles faster is not kept, unless JAX was told otherwise by that variable."""


told: list[Callable[[str], None]] = []
"""Who is told of long compilations; the last one is."""


def keep_compiled(folder: str | None) -> None:
    """Has JAX keep compiled programs in a folder, so that a later run with equal shapes does not wait for them.

    None is the folder that JAX was told (JAX_COMPILATION_CACHE_DIR), else rlhf_jax/ in the user's cache folder. Of
    many hosts, whose folders JAX does not keep alike, only one that was told is used. "none" keeps nothing. Raises
    UserError for a folder that cannot be written.
    """
    if folder == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder is None and (many() or jax.config.jax_compilation_cache_dir):  # type: ignore[attr-defined]
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
    if TOLD not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORT)


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
    """Has `say` told of each program that takes long to compile, while the `with` lasts.

    Inside of another `with` of this kind only the inner one's `say` is told.
    """
    traced: dict[str, float] = {}
    waiting: dict[str, threading.Timer] = {}
    told.append(say)

    def listener(event: str, duration_secs: float, **of: str | int) -> None:
        if told[-1] is not say:
            return
        name = str(of.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
        if event == TRACED:
            traced[name] = duration_secs
        elif event == LOWERED:
            traced[name] = traced.get(name, 0.0) + duration_secs
            waiting[name] = timer = threading.Timer(WAIT, say, [f"compiling {name} …"])
            timer.daemon = True
            timer.start()
        elif event == COMPILED:
            if name in waiting:
                waiting.pop(name).cancel()
            whole = traced.pop(name, 0.0) + duration_secs
            if whole > LONG:
                say(f"compiled {name} in {whole:.0f} s")

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield
    finally:
        for timer in waiting.values():
            timer.cancel()
        told.remove(say)
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
