"""Programs that a model has written, scored by tests.

`run_tests` runs a program and its tests in two sandboxes (`sandbox.py`). The program's process is asked for what its
functions return, and what it answers leaves it as data. Every test is run, and every comparison made, in the other
process, which alone knows the expected values and alone tells the verdict.

Guaranteed: a program makes a test pass only by answering the test's calls with data for which the test holds. It has
no way to the verdict: exiting, printing, patching what is in its process, and objects with an `__eq__` of their own
change nothing in the process that compares; and it never holds the tests, only the arguments of calls.

Not guaranteed: more than a test asks for. One that lets the program judge (`assert program_says_ok(result)`, or that
calls a method of the program's own class with the expected value) believes it, and one that compares an argument with
itself after the call sees what the program made of it. Side channels, such as the time, and faults of the kernel.

What cannot be compared as data fails: an instance of the program's own class, a numpy array. Such objects can be
called, indexed, iterated and asked for attributes; what comes of it is compared. Classes that tests define are the
program's too. A program may have threads and start no process.
"""

import math
import os
import re
import select
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any, NamedTuple

from rlhf_jax.errors import UserError
from rlhf_jax.rewards.sandbox import Sandboxed, start, stop
from rlhf_jax.rewards.sandboxed.limits import Limits
from rlhf_jax.rewards.sandboxed.wire import COUNT, Breach, NotPlain, decode, encode
from rlhf_jax.rewards.text import Text, text_of

START_SECONDS = 60.0
"""For two interpreters to start in, on a machine that is busy. The program's own time begins after it."""
TMP_BYTES = 16 * 2**20
OPEN_FILES = 64
LEAST_MEMORY = 64 * 2**20
EXAMINER_MEMORY = 512 * 2**20
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


class TestRun(NamedTuple):
    """How a program fared."""

    passed: int
    total: int
    reason: str
    """Why the first of the others failed, in one line; "" when all passed."""


def run_tests(
    program: str,
    tests: Sequence[str],
    *,
    time_limit: float | int,
    memory_limit: int,
    unsafe_without_sandbox: bool = False,
) -> TestRun:
    """Runs a program and then its tests, each a text of Python that fails when it raises (`assert f(1) == 2`).

    The tests share their names, and see the program's. `time_limit`: seconds of wall time for all of it, once the
    interpreters are up; `memory_limit`: bytes of address space of the program. `unsafe_without_sandbox` runs a
    program that you trust as this user, with the limits alone.
    Raises ValueError without a test and for limits that nothing fits in, UserError where no sandbox can be made.
    """
    if not tests or isinstance(tests, str) or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"tests are a list of texts, at least one, and not {tests!r:.80}")
    if not 0 < time_limit < math.inf or memory_limit < LEAST_MEMORY:
        raise ValueError(f"limits of {time_limit} s and {memory_limit} bytes: at least {LEAST_MEMORY} bytes, > 0 s")
    limits = Limits(math.ceil(time_limit) + 1, memory_limit, TMP_BYTES, OPEN_FILES)
    message = encode((program, tuple(tests)), [], _refuse)
    running: list[Sandboxed] = []
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            running.append(start("program", theirs.fileno(), limits, unsafe=unsafe_without_sandbox))
            roomy = limits._replace(memory=EXAMINER_MEMORY)
            running.append(start("examiner", ours.fileno(), roomy, unsafe=unsafe_without_sandbox))
        reasons = _verdicts(running, message, len(tests), time_limit)
    finally:
        stop(running)
    failed = [(number, reason) for number, reason in enumerate(reasons) if reason]
    first = f"test {failed[0][0]} ({_short(tests[failed[0][0]])}): {failed[0][1]}" if failed else ""
    return TestRun(len(tests) - len(failed), len(tests), first)


def code_reward(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    tests: Sequence[Sequence[str] | None],
    time_limit: float | int = 10.0,
    memory_limit: int = 512 * 2**20,
    jobs: int | None = None,
    unsafe_without_sandbox: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 for each completion whose program passes all tests of its row, otherwise 0; with TRL's signature.

    `tests`: a list of texts for each row; where it has none (None), neither has it a score. The program is what
    `find_program` finds. `jobs` run at a time, by default one on each core. Raises UserError for tests that are none,
    and as `run_tests` does.
    """
    for row, some in enumerate(tests):
        if some is None:
            continue
        if not some or isinstance(some, str) or not all(isinstance(test, str) for test in some):
            raise UserError(f"row {row}: its tests are a list of texts, at least one, and not {some!r:.80}")
    programs = [find_program(p, c) for p, c in zip(prompts, completions, strict=True)]
    run = partial(
        run_tests, time_limit=time_limit, memory_limit=memory_limit, unsafe_without_sandbox=unsafe_without_sandbox
    )
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        pairs = zip(programs, tests, strict=True)
        runs = [None if some is None else pool.submit(run, program, some) for program, some in pairs]
        found = [None if some is None else some.result() for some in runs]
    return [None if some is None else float(some.passed == some.total) for some in found]


def find_program(prompt: Text, completion: Text) -> str:
    """The program in a completion: its last fenced block of Python, or of no language.

    Without one it is all of it; and after the prompt, when it goes on with the prompt's function, whose body is
    indented.
    """
    text = text_of(completion)
    blocks = [block for language, block in FENCE.findall(text) if language.lower() in ("", "py", "python", "python3")]
    if blocks:
        return str(blocks[-1])
    first = next((line for line in text.splitlines() if line.strip()), "")
    return text_of(prompt) + text if first[:1].isspace() else text


def _verdicts(running: Sequence[Sandboxed], message: bytes, count: int, time_limit: float | int) -> list[str]:
    """Why each test failed, "" where it passed. Raises UserError when the sandboxes do not start."""
    process = running[-1].process
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(COUNT.pack(len(message)) + message)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended: the next line says why
    if _frame(process.stdout, time.monotonic() + START_SECONDS) != "ready":
        raise UserError(f"no sandbox can be made here: {_said(running)}")
    deadline = time.monotonic() + time_limit
    reasons: list[str] = []
    while len(reasons) < count:
        reason = _frame(process.stdout, deadline)
        if reason is None:
            late = time.monotonic() >= deadline
            rest = f"no verdict within {time_limit:g} s" if late else "the tests' own process has ended"
            return reasons + [rest] * (count - len(reasons))
        reasons.append(reason)
    return reasons


def _frame(stream: IO[bytes], deadline: float) -> str | None:
    """The next text from the examiner, None at its end and at the deadline."""
    parts = b""
    while len(parts) < 4 or len(parts) < 4 + COUNT.unpack(parts[:4])[0]:
        wanted = 4 - len(parts) if len(parts) < 4 else 4 + COUNT.unpack(parts[:4])[0] - len(parts)
        if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        part = os.read(stream.fileno(), wanted)
        if not part:
            return None
        parts += part
    try:
        return str(decode(parts[4:], [], _refuse))
    except (Breach, NotPlain):
        return None


def _said(running: Sequence[Sandboxed]) -> str:
    """The last line that one of the processes wrote before it ended."""
    for process, errors in running:
        try:
            process.kill()
            process.wait()
        finally:
            said = os.read(errors, 65536).decode(errors="replace").strip()
        if said:
            return said.splitlines()[-1]
    return f"the interpreters were not up within {START_SECONDS:g} s"


def _short(test: str) -> str:
    line = " ".join(test.split())
    return line if len(line) <= 80 else line[:79] + "…"


def _refuse(*_: Any) -> Any:
    raise NotPlain("not plain data")
