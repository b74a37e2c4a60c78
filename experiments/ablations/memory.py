"""The memory that a part of a program needs, on Linux: the most that its process holds, less what it held before."""

import ctypes
import gc
from pathlib import Path

PROCESS = Path("/proc/self")


def process_memory(name: str) -> float:
    """Bytes of this process by the kernel's name for them: VmRSS are those now, VmHWM those at the most."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def start_peak() -> float | None:
    """Gives freed memory back and begins a new peak; returns the bytes that are held, None where nobody tells."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc keeps what is freed after `keep_freed_memory`
        libc.malloc_trim(0)
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return None
    return process_memory("VmRSS")


def peak_since(held: float) -> float:
    """Bytes that were held at the most since `start_peak`, less the `held` that it returned."""
    return process_memory("VmHWM") - held
