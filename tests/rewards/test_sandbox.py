import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attacks import ATTACKS, RIGHT, TESTS, attack

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import sandbox, seccomp
from rlhf_jax.rewards.code import run_tests

SCRIPT = """
from rlhf_jax.rewards.code import run_tests
run_tests("while True: pass", ["assert 1"], time_limit=600, memory_limit=2**28)
"""


pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None,
    reason="bubblewrap is not installed: install the system's package bubblewrap, as .ci/run does",
)


@pytest.mark.parametrize("one", ATTACKS, ids=lambda one: f"{one.kind}: {one.name}")
def test_an_attack_scores_nothing_and_leaves_nothing(one):
    found = attack(one, time_limit=1.0)
    assert (found.passed, found.processes, found.files) == (0, [], []) and found.seconds < 15, found


def test_a_right_program_passes_the_same_tests():
    assert run_tests(RIGHT, TESTS, time_limit=5.0, memory_limit=2**28) == (3, 3, "")


@pytest.mark.parametrize(
    "program",
    [
        "import threading\nthread = threading.Thread(target=print); thread.start(); thread.join()\n",
        "import tempfile\nwith tempfile.NamedTemporaryFile() as f: f.write(b'x' * 2**20)\n",
        "import asyncio\nasyncio.run(asyncio.sleep(0))\n",
        "import re, json, random, heapq, numpy\nnumpy.zeros(10).sum()\n",
    ],
)
def test_what_a_program_may_do(program):
    found = run_tests(program + RIGHT, TESTS, time_limit=20.0, memory_limit=2**29)
    assert found.passed == 3, found


def test_without_bubblewrap_it_refuses_unless_told_by_name(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"bubblewrap .* is not installed.*unsafe_without_sandbox=True"):
        run_tests(RIGHT, TESTS, time_limit=5.0, memory_limit=2**28)
    found = run_tests(RIGHT, TESTS, time_limit=20.0, memory_limit=2**28, unsafe_without_sandbox=True)
    assert found == (3, 3, "")


def test_a_sandbox_that_cannot_be_made_is_told_in_its_own_words(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: str(fake))
    with pytest.raises(UserError, match="no sandbox can be made here: bwrap: No permissions"):
        run_tests(RIGHT, TESTS, time_limit=5.0, memory_limit=2**28)


def test_a_processor_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="knows the system calls of x86_64 and aarch64, not those of m68k"):
        seccomp.filter_calls("m68k")
    assert len(seccomp.filter_calls("aarch64")) % 8 == len(seccomp.filter_calls("x86_64")) % 8 == 0


def test_sandboxes_end_with_the_process_that_made_them():
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], start_new_session=True)
    try:
        wait_for(lambda: len(children(process.pid)) == 2)
        time.sleep(2.0)  # until the program is in its loop, in which nothing tells it of its parent's end
        mine = [pid for child in children(process.pid) for pid in (child, *children(child))]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not any(map(runs, mine)))


def runs(pid):
    """Whether a process is there and has not ended: one that nobody has waited for has no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


REFUSED = """
import ctypes, os, resource, socket, threading
libc = ctypes.CDLL(None, use_errno=True)

def allowed(names):
    found = []
    for name in names:
        try:
            if ACTIONS[name]() == -1:
                raise OSError(ctypes.get_errno())
        except (OSError, RuntimeError, ValueError):
            continue
        found.append(name)
    return found

ACTIONS = {
    "fork": lambda: os.fork() or os._exit(0),
    "vfork": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "ptrace": lambda: libc.ptrace(0, 0, 0, 0),
    "unshare": lambda: libc.unshare(0x10000000),
    "keyctl": lambda: libc.syscall(250 if os.uname().machine == "x86_64" else 219, 0, -3, 1),
    "memfd": lambda: os.memfd_create("x"),
    "inet": lambda: socket.socket(),
    "vsock": lambda: socket.socket(40, 1),
    "root": lambda: open("/x", "w"),
    "usr": lambda: open("/usr/x", "w"),
    "dev": lambda: open("/dev/x", "w"),
    "proc": lambda: os.listdir("/proc"),
    "limits": lambda: resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40)),
    "a thread": lambda: threading.Thread(target=print).start(),
    "tmp": lambda: open("/tmp/x", "w"),
    "a Unix socket": lambda: socket.socket(socket.AF_UNIX),
}

def limits():
    names = ("CPU", "AS", "FSIZE", "NOFILE", "CORE")
    return [resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in names]

def tmp():
    found = os.statvfs("/tmp")
    names = set(os.environ) - {"OPENBLAS_NUM_THREADS", "PWD", "LC_CTYPE"}
    return found.f_blocks * found.f_frsize, os.listdir("/tmp"), names
"""


def test_what_is_refused_and_what_has_a_limit():
    tests = [
        "assert allowed(list(ACTIONS)) == ['a thread', 'tmp', 'a Unix socket']",
        "assert limits() == [(6, 6), (2**29, 2**29), (2**24, 2**24), (64, 64), (0, 0)]",
        "assert tmp() == (2**24, ['x'], set())",
    ]
    found = run_tests(REFUSED, tests, time_limit=5.0, memory_limit=2**29)
    assert found == (3, 3, "")
