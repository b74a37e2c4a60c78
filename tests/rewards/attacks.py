"""Hostile programs: each tries to score without adding two numbers, or to do harm. As a script it prints a table.

python tests/rewards/attacks.py > experiments/results/sandbox.md
"""

import ctypes
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.rewards.code import run_tests

TESTS = ("assert add(2, 3) == 5", "assert add(10, 5) == 15", "assert add('a', 'b') == 'ab'")
MARK = "left-behind-by-a-hostile-program"
RIGHT = "def add(a, b): return a + b\n"


class Attack(NamedTuple):
    """What it tries, the program, and the tests that it is given."""

    kind: str
    name: str
    program: str
    tests: tuple[str, ...] = TESTS


def read() -> list[Attack]:
    """The attacks in attacks.txt: "=== kind: name", the program, and its tests where it has others than `TESTS`."""
    text = Path(__file__).with_name("attacks.txt").read_text(encoding="utf-8")
    for sign, value in (("@MARK@", MARK), ("@FILE@", __file__), ("@FOLDER@", str(Path(__file__).parents[1]))):
        text = text.replace(sign, value)
    found = []
    for part in text.removeprefix("=== ").split("\n=== "):
        title, _, rest = part.partition("\n")
        kind, _, name = title.partition(": ")
        program, *tests = rest.rstrip("\n").split("\n--- test\n")
        found.append(Attack(kind, name, program + "\n", tuple(tests) or TESTS))
    return found


ATTACKS = read()


class Result(NamedTuple):
    """What came of an attack."""

    passed: int
    total: int
    seconds: float
    reason: str
    processes: list[str]
    """Command lines of processes that were not there before."""
    files: list[str]
    """Files in places that anybody can write to that were not there before."""


def attack(one: Attack, *, time_limit: float) -> Result:
    """Runs an attack and looks at what it left on this machine."""
    # So that a process whose parent has ended becomes a child of this one (PR_SET_CHILD_SUBREAPER).
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    files = _files()
    start = time.monotonic()
    run = run_tests(one.program, one.tests, time_limit=time_limit, memory_limit=256 * 2**20)
    seconds = time.monotonic() - start
    return Result(run.passed, run.total, seconds, run.reason, _processes(), sorted(_files() - files))


def _processes() -> list[str]:
    """Processes of sandboxes, or with the attackers' mark, that are children of this process or of nobody."""
    orphans = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            command = folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended
        orphans += [command] if parent in ("1", str(os.getpid())) else []
    return [command[:80] for command in orphans if "sandboxed" in command or MARK in command]


def _files() -> set[str]:
    places = {"/", "/tmp", "/dev/shm", "/var/tmp", "/usr", "/etc", "/run", tempfile.gettempdir(), os.getcwd()}
    places.add(str(Path.home()))
    return {str(path) for place in places if os.path.isdir(place) for path in Path(place).glob(f"*{MARK}*")}


HEAD = """# The sandbox: attack → score, and what was left behind

Command: `python tests/rewards/attacks.py > experiments/results/sandbox.md`. Each program is given tests that it does
not solve; the score is the number of tests that passed. After each the machine's processes, and the places that
anybody can write to, are searched. `tests/rewards/attacks.txt` has the programs; `test_sandbox.py` runs the same list.

{count} attacks on {machine}, Linux {linux}, as {user}.

| kind | attack | score | processes left | files left | seconds | what was said |
|---|---|---:|---:|---:|---:|---|"""


def main() -> None:
    """Prints the table, and ends with 1 when an attack has scored or left something."""
    user = "root" if os.getuid() == 0 else "a user"
    print(
        HEAD.format(count=len(ATTACKS), machine=platform.machine(), linux=platform.release().split("-")[0], user=user)
    )
    bad = 0
    for one in ATTACKS:
        found = attack(one, time_limit=2.0)
        bad += bool(found.passed or found.processes or found.files)
        said = found.reason.partition("): ")[2].replace("|", "\\|")[:110]
        print(
            f"| {one.kind} | {one.name} | {found.passed}/{found.total} | {len(found.processes)} | {len(found.files)} "
            f"| {found.seconds:.1f} | {said} |",
            flush=True,
        )
    start, count = time.monotonic(), 200
    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(lambda _: run_tests(RIGHT, TESTS, time_limit=10.0, memory_limit=2**28), range(count)))
    rate = count / (time.monotonic() - start)
    passed = sum(found.passed == found.total for found in right)
    print(f"\nA right program, {count} times, two at a time: {passed} pass all tests; {rate:.0f} programs a second.")
    sys.exit(1 if bad or passed < count else 0)


if __name__ == "__main__":
    main()
