"""Processes that encode rows beside each other, each a Python of its own that knows only the tokenizer.

The rows come out in the order in which they went in. A process ends when its pipe does, so none outlives the run.
Where a run has many hosts, each encodes its share, and hears the ids of the others'.
"""

import os
import pickle
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from queue import SimpleQueue
from typing import IO, Any

from rlhf_jax import clock, hosts
from rlhf_jax.data.encode import Outcome, encode_rows, outcome, settled
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.data.rows import Read
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase, Steady
from rlhf_jax.errors import UserError

MANY = 4096
"""Rows that this process encodes itself, before it starts others."""
CHUNK = 256
MOST = 8
"""Processes, where nobody says more."""


def default_processes() -> int:
    """One for each core that this process may use, at most eight."""
    return min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def encode_many(
    rows: Iterable[Read], tokenizer: PreTrainedTokenizerBase, max_length: int, rejects: Rejects, *, processes: int
) -> Iterator[tuple[Read, Any]]:
    """`encode_rows`, in so many processes from row number `MANY` on, and each of many hosts its share."""
    rows = iter(rows)
    yield from encode_rows(islice(rows, MANY), tokenizer, max_length, rejects)
    following = list(islice(rows, 1))
    if following and (processes > 1 or hosts.many()):
        with _encoding(tokenizer, max_length, processes) as encode:
            ahead = max(2, 2 * processes // hosts.place()[1])  # each is a chunk for every host
            yield from settled(_in_chunks(chain(following, rows), encode, ahead), rejects)
    else:
        yield from encode_rows(chain(following, rows), tokenizer, max_length, rejects)


Encode = Callable[[list[Any]], Callable[[], list[Outcome]]]
"""encode(rows) begins with them, and returns what waits for the outcomes."""


def _in_chunks(rows: Iterator[Read], encode: Encode, ahead: int) -> Iterator[tuple[Read, Outcome]]:
    """The outcomes of all rows, of which each host encodes every so-many-th chunk; `ahead` chunks are begun before."""
    number, count = hosts.place()
    waiting: deque[tuple[list[Read], Callable[[], list[Outcome]]]] = deque()
    broken: Exception | None = None  # by a row that cannot be read, after those that wait
    while True:
        while broken is None and len(waiting) < ahead:
            chunks: list[Read] = []
            try:
                chunks.extend(islice(rows, count * CHUNK))
            except Exception as error:
                broken = error
            if not chunks:
                break
            own = chunks[number * CHUNK : (number + 1) * CHUNK]
            waiting.append((chunks, encode([read.row for read in own])))
        if not waiting:
            break
        chunks, found = waiting.popleft()
        yield from zip(chunks, _of_all(found), strict=True)
    if broken is not None:
        raise broken


def _of_all(found: Callable[[], list[Outcome]]) -> list[Outcome]:
    """The outcomes of all hosts. Raises UserError in each where an error is raised in one."""
    if not hosts.many():
        return found()
    try:
        said: Any = found()
    except Exception as error:
        said = error if isinstance(error, UserError) else UserError(f"{type(error).__name__}: {error}")
    heard = [pickle.loads(some) for some in hosts.gather_bytes(pickle.dumps(said, protocol=5))]
    for some in heard:
        if isinstance(some, UserError):
            raise some
    return [outcome for some in heard for outcome in some]


@contextmanager
def _encoding(tokenizer: PreTrainedTokenizerBase, max_length: int, processes: int) -> Iterator[Encode]:
    """encode(rows) in so many processes; in this one, when its outcomes are waited for, where that is one."""
    if processes < 2:
        steady: Any = Steady(tokenizer)
        yield lambda rows: lambda: [outcome(row, steady, max_length) for row in rows]
        return
    free: SimpleQueue[_Encoder] = SimpleQueue()
    encoders: list[_Encoder] = []
    first_words = _framed((tokenizer, max_length, clock.now().isoformat()))

    def work(rows: list[Any]) -> list[Outcome]:
        encoder = free.get()
        try:
            return encoder.encode(rows)
        finally:
            free.put(encoder)

    try:
        for _ in range(processes):
            encoders.append(_Encoder(first_words))
            free.put(encoders[-1])
        with ThreadPoolExecutor(processes) as pool:
            yield lambda rows: pool.submit(work, rows).result
    finally:
        for encoder in encoders:
            encoder.end()


class _Encoder:
    """A process, and the pipes to it. It hears of the tokenizer before its first rows."""

    def __init__(self, first_words: bytes):
        paths = os.pathsep.join(filter(None, sys.path))
        self._first_words = first_words
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_jax.data.encoders"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"a process that encodes rows cannot start: {error.strerror}; --num-proc 1 does without"
            ) from None

    def encode(self, rows: list[Any]) -> list[Outcome]:
        """Encodes rows there. Raises UserError where the process has ended."""
        try:
            _send(self._process.stdin, self._first_words + _framed(rows))
            self._first_words = b""
            found = _receive(self._process.stdout)
        except (OSError, EOFError):
            raise UserError(
                f"a process that encodes rows has ended (exit code {self._process.wait()}); --num-proc 1 does without"
            ) from None
        if isinstance(found, Exception):
            raise found
        return found

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:
                pass
        self._process.wait()


def _framed(message: Any) -> bytes:
    content = pickle.dumps(message, protocol=5)
    return struct.pack("<q", len(content)) + content


def _send(pipe: IO[bytes] | None, frames: bytes) -> None:
    assert pipe is not None
    pipe.write(frames)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> Any:
    assert pipe is not None
    head = pipe.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(pipe.read(struct.unpack("<q", head)[0]))


def live() -> None:
    """A process's life: rows in, outcomes out, until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        tokenizer, max_length, moment = _receive(sys.stdin.buffer)
        clock.keep(moment)
        steady: Any = Steady(tokenizer)
        while True:
            rows = _receive(sys.stdin.buffer)
            try:
                found: Any = [outcome(row, steady, max_length) for row in rows]
            except UserError as error:
                found = error
            _send(out, _framed(found))
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    live()
