"""Sandboxes of bubblewrap for programs that may be hostile: https://github.com/containers/bubblewrap.

A process in one sees Python, its packages and the system's libraries, read-only, and an empty /tmp of its own. It has
no network, no environment, no /proc, no capabilities, sees no other process, and may start none (`seccomp.py`); its
memory, CPU seconds, files and output have limits (`sandboxed/limits.py`). It ends with this process, and when killed.
Not limited: the number of threads, other than by memory; empty files in /tmp, other than by the CPU seconds.
"""

import compileall
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.errors import UserError
from rlhf_jax.rewards.sandboxed.limits import Limits
from rlhf_jax.rewards.seccomp import filter_calls

FOLDER = Path(__file__).with_name("sandboxed")
HOME = Path("/own")
"""Where a sandbox has that folder, as the one package of a library without any other file."""
START = (
    "import sys; sys.path.append(sys.argv[1]); from rlhf_jax.rewards.sandboxed.limits import Limits; "
    "from rlhf_jax.rewards.sandboxed.{name} import main; sys.path.remove(sys.argv[1]); "
    "main(int(sys.argv[2]), Limits(*map(int, sys.argv[3:7])), sys.argv[7:])"
)
PACKAGES = tuple(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", sys.base_prefix)


@cache
def _compile_once() -> None:
    """Writes Python's bytecode where this user may: in a sandbox nobody may, and with it one starts sooner."""
    compileall.compile_dir(FOLDER, quiet=2)


class Sandboxed(NamedTuple):
    """A process in a sandbox."""

    process: subprocess.Popen
    errors: int
    """A pipe: what it says before it is ready. Each process of the sandbox holds its other end while it lives."""


def start(name: str, fd: int, limits: Limits, *, unsafe: bool) -> Sandboxed:
    """Starts sandboxed/NAME.py with one end of a link, `fd`. To be stopped with `stop`.

    `unsafe`: without a sandbox, as this user, with the limits alone. Raises UserError when there is no bubblewrap.
    """
    home = FOLDER.parents[2] if unsafe else HOME
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    _compile_once()
    packages = PACKAGES if unsafe else _shown_packages()
    arguments = [str(home), str(fd), *map(str, limits), *packages]
    python = [interpreter, "-I", "-S", "-c", START.format(name=name), *arguments]
    errors, theirs = os.pipe()
    try:
        calls = _pipe_with(b"" if unsafe else filter_calls())
        try:
            process = subprocess.Popen(
                python if unsafe else [*wrap(limits.file_bytes, calls), *python],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs, env={}, start_new_session=True,
                pass_fds=(fd, calls), cwd="/",
            )  # fmt: skip
        finally:
            os.close(calls)
    except BaseException:
        os.close(errors)
        raise
    finally:
        os.close(theirs)
    return Sandboxed(process, errors)


def _pipe_with(content: bytes) -> int:
    """The reading end of a pipe that holds a few thousand bytes."""
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    return reading


def wrap(tmp_bytes: int, calls: int) -> list[str]:
    """The command that makes a sandbox, before the command that runs in it. `calls`: a pipe with the filter.

    Raises UserError when there is no bubblewrap.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise UserError(
            "programs to be scored may be hostile, and bubblewrap (bwrap), which locks them in, is not installed: "
            "install the system's package bubblewrap, or give unsafe_without_sandbox=True to run them as this user"
        )
    shown_folder = HOME / FOLDER.relative_to(FOLDER.parents[2])
    places = dict(zip(SYSTEM, SYSTEM, strict=True)) | dict(zip(PACKAGES, _shown_packages(), strict=True))
    shown = [part for path, place in places.items() for part in ("--ro-bind-try", path, place)]
    paths = [f"/dev/{name}" for name in ("null", "zero", "random", "urandom")]
    devices = [part for path in paths for part in ("--dev-bind", path, path)]
    return [
        found, "--unshare-all", "--die-with-parent", "--clearenv", "--cap-drop", "ALL",
        "--size", str(tmp_bytes), "--tmpfs", "/tmp", *shown, *devices, "--ro-bind", str(FOLDER), str(shown_folder),
        "--chdir", "/tmp", "--remount-ro", "/", "--seccomp", str(calls), "--",
    ]  # fmt: skip


def _shown_packages() -> list[str]:
    """Where a sandbox shows the folders of `PACKAGES`: theirs may be in /tmp, where a program's own files are."""
    return [f"/packages{number}" for number in range(len(PACKAGES))]


def stop(sandboxed: Sequence[Sandboxed]) -> None:
    """Kills the processes and all that is in their sandboxes, and waits until they are gone."""
    for process, _ in sandboxed:
        try:
            # Before it is waited for: until then nobody else has its number.
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    for process, errors in sandboxed:
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # of what was still to be written
                    stream.close()
        with open(errors, "rb", buffering=0) as pipe:
            # Without a sandbox a process may have got away with its end.
            while select.select([pipe], [], [], 5.0)[0] and pipe.read(65536):
                pass
