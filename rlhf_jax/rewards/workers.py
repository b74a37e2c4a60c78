"""Killable processes that call a user's function: those that hang are killed, those that die are replaced.

They are new programs and not forks, which JAX's threads do not survive. A worker ends with its parent, however that
ends. None sees an accelerator through JAX (JAX_PLATFORMS=cpu): those are the run's.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Container, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.errors import UserError
from rlhf_jax.rewards.worker import Reply, Setup

PROGRAM = Path(__file__).with_name("worker.py")


class Failed(NamedTuple):
    """Why a call has no reply: it took too long (the worker was killed), or the worker died."""

    reason: str
    timeout: bool


class _Worker(NamedTuple):
    process: subprocess.Popen
    link: Connection
    life: Connection
    """Never written to: its end tells the worker that this process has ended."""


class Pool:
    """Up to `jobs` worker processes with one function. To be closed, or used in a `with`; one call at a time.

    Raises UserError when the function does not load within `start_seconds`, at once and when a worker is replaced.
    """

    def __init__(self, setup: Setup, *, jobs: int, start_seconds: float):
        self._setup, self._jobs, self._start_seconds = setup, jobs, start_seconds
        self._workers: list[_Worker] = []
        self._ended = False
        try:
            self._fill(jobs)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True  # a call that another thread is in starts no new workers
        self.close()

    def map(self, requests: Sequence[Any], seconds: Sequence[float]) -> Iterator[tuple[int, Reply | Failed]]:
        """(number of the request, its reply) as they come; `seconds` is the time that each may take.

        A caller who stops before the last, or is interrupted, leaves no worker: the next call starts new ones.
        """
        waiting = deque(range(len(requests)))
        busy: dict[Connection, tuple[_Worker, int, float]] = {}
        try:
            while waiting or busy:
                self._fill(min(self._jobs, len(busy) + len(waiting)), busy)
                for worker in [worker for worker in self._workers if worker.link not in busy][: len(waiting)]:
                    number = waiting.popleft()
                    busy[worker.link] = worker, number, time.monotonic() + seconds[number]
                    try:
                        worker.link.send(requests[number])
                    except OSError:
                        pass  # it has died: the link says so below
                first = min(deadline for _, _, deadline in busy.values())
                answered = wait(list(busy), timeout=max(0.0, first - time.monotonic()))
                now = time.monotonic()
                for link, (worker, number, deadline) in list(busy.items()):
                    if link in answered or deadline <= now:
                        del busy[link]
                        yield number, self._receive(worker, seconds[number])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kills every worker, and what it started."""
        while self._workers:
            self._kill(self._workers[-1])

    def _receive(self, worker: _Worker, seconds: float) -> Reply | Failed:
        """The reply that is there, or why there is none; the worker is killed then."""
        try:
            if worker.link.poll():
                return worker.link.recv()
        except (EOFError, OSError):
            return Failed(f"its process died ({_cause(self._kill(worker))})", timeout=False)
        self._kill(worker)
        return Failed(f"no score within {seconds:g} s", timeout=True)

    def _fill(self, count: int, busy: Container[Connection] = ()) -> None:
        """Replaces workers that have died, so that there are `count`; one that is busy is left to who waits for it."""
        if self._ended:
            raise RuntimeError("the pool has ended")
        idle = [worker for worker in self._workers if worker.link not in busy]
        for worker in idle:
            if worker.process.poll() is not None:
                self._kill(worker)
        new = [self._start() for _ in range(count - len(self._workers))]
        for worker in new:
            self._loaded(worker)

    def _start(self) -> _Worker:
        link, their_link = Pipe()
        their_life, life = Pipe(duplex=False)
        fds = their_link.fileno(), their_life.fileno()
        with their_link, their_life:
            process = subprocess.Popen(
                [sys.executable, "-P", "-u", str(PROGRAM), *map(str, fds)],
                pass_fds=fds, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )  # fmt: skip
        worker = _Worker(process, link, life)
        self._workers.append(worker)
        try:
            link.send(tuple(self._setup))
        except OSError:
            pass  # it has died: `_loaded` says so
        return worker

    def _loaded(self, worker: _Worker) -> None:
        path = self._setup.path
        try:
            if not worker.link.poll(self._start_seconds):
                raise UserError(f"{path}: it did not load within {self._start_seconds:g} s")
            kind, reason = worker.link.recv()
        except (EOFError, OSError):
            raise UserError(f"{path}: its process died while it loaded ({_cause(self._kill(worker))})") from None
        if kind != "loaded":
            raise UserError(f"{path}: {reason}")

    def _kill(self, worker: _Worker) -> int:
        """Ends a worker and its children; its exit code, negative for a signal."""
        self._workers.remove(worker)
        try:
            # Before it is waited for: until then nobody else has its number.
            os.killpg(worker.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        code = worker.process.wait()
        worker.link.close()
        worker.life.close()
        return code


def _cause(code: int) -> str:
    try:
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
