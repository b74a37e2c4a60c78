"""No worker outlives what started it: not `close`, not an interruption, not a parent that was killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rlhf_jax.rewards.worker import Setup
from rlhf_jax.rewards.workers import Failed, Pool

TELL = "import os, re, subprocess, time\ndef score(completions, **_):\n"
NOTE = "    open(completions[0], 'w').write(str(os.getpid()))\n"
BUSY = {
    "a sleep": "    time.sleep(60)\n",
    "a loop": "    while True: pass\n",
    # One long call of C, which never gives up Python's lock.
    "a regular expression": "    re.match('(a+)+$', 'a' * 64 + 'b')\n",
}
PARENT = """
import sys
from rlhf_jax.rewards.worker import Setup
from rlhf_jax.rewards.workers import Pool
source, noted = sys.argv[1:]
pool = Pool(Setup("f.py", "score", source.encode(), None, ""), jobs=2, start_seconds=20.0)
print([worker.process.pid for worker in pool._workers], flush=True)
list(pool.map([(["p"], [noted], {})], [60.0]))
"""


def open_pool(source, jobs=1):
    return Pool(Setup("f.py", "score", source.encode(), None, ""), jobs=jobs, start_seconds=20.0)


def alive(pid):
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, within=5.0):
    deadline = time.monotonic() + within
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def written(path):
    """What a worker wrote, once it is there."""
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, "the worker never ran"
        time.sleep(0.02)
    return [int(word) for word in path.read_text().split()]


def pids(pool):
    return [worker.process.pid for worker in pool._workers]


def test_closing_leaves_no_worker():
    with open_pool("def score(**_): return [1]", jobs=2) as pool:
        assert dict(pool.map([([], ["a"], {})] * 3, [5.0] * 3)) == dict.fromkeys(range(3), ("scores", [1.0]))
        workers = pids(pool)
        assert len(workers) == 2 and all(map(alive, workers))
    assert gone(workers, within=0.0)


@pytest.mark.parametrize("busy", BUSY.values(), ids=BUSY)
def test_a_call_that_hangs_is_killed_with_what_it_started(tmp_path, busy):
    note = (
        "    child = subprocess.Popen(['sleep', '60']).pid\n"
        "    open(completions[0], 'w').write(f'{os.getpid()} {child}')\n"
    )
    with open_pool(TELL + note + busy) as pool:
        start = time.monotonic()
        ((_, reply),) = pool.map([([], [str(tmp_path / "pids")], {})], [1.0])
        assert reply == Failed("no score within 1 s", timeout=True) and time.monotonic() - start < 10.0
        worker, child = written(tmp_path / "pids")
        assert gone([worker, child])


def test_a_worker_that_died_between_two_calls_is_replaced():
    with open_pool("def score(**_): return [1]") as pool:
        os.kill(pids(pool)[0], signal.SIGKILL)
        pool._workers[0].process.wait()  # its threads end one after the other, and its links with the last of them
        assert list(pool.map([([], ["a"], {})], [5.0])) == [(0, ("scores", [1.0]))]


def test_one_that_dies_while_another_answers_is_told_apart():
    """The dead one's link is still waited for when the pool looks for workers to replace."""
    source = (
        "import os, time\ndef score(completions, **_):\n    if completions[0] == 'die': os._exit(3)\n    return [1]"
    )
    with open_pool(source, jobs=2) as pool:
        for _ in range(5):
            requests = [([], [text], {}) for text in ("die", "a", "b", "die", "c")]
            found = dict(pool.map(requests, [5.0] * 5))
            assert [type(found[n]).__name__ for n in range(5)] == ["Failed", "tuple", "tuple", "Failed", "tuple"]


def test_it_works_off_the_main_thread_and_when_that_thread_has_ended():
    found = []
    thread = threading.Thread(target=lambda: found.append(open_pool("def score(**_): return [1]")))
    thread.start()
    thread.join()
    with found[0] as pool:
        first = pids(pool)
        thread = threading.Thread(target=lambda: found.extend(pool.map([([], ["a"], {})], [5.0])))
        thread.start()
        thread.join()
        assert found[1:] == [(0, ("scores", [1.0]))] and pids(pool) == first


def test_an_interruption_and_a_caller_who_stops_leave_no_worker(tmp_path):
    pool = open_pool(
        TELL + NOTE + "    time.sleep(60 if completions[0].endswith('slow') else 0)\n    return [1]\n", jobs=2
    )
    with pool:
        workers = pids(pool)
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            list(pool.map([([], [str(tmp_path / "slow")], {})], [30.0]))
        assert gone(workers, within=0.0)
        replies = pool.map([([], [str(tmp_path / name)], {}) for name in ("slow", "fast")], [30.0, 30.0])
        assert next(replies) == (1, ("scores", [1.0]))
        workers = pids(pool)
        replies.close()
        assert len(workers) == 2 and gone(workers, within=0.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", BUSY.values(), ids=BUSY)
def test_workers_end_with_their_parent(tmp_path, busy, number):
    noted = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, TELL + NOTE + busy, str(noted)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    with parent:
        workers = eval(parent.stdout.readline())
        assert written(noted)[0] in workers and all(map(alive, workers))
        parent.send_signal(number)
        assert parent.wait(timeout=10) != 0
    assert gone(workers)


def test_a_worker_sees_no_accelerator_and_is_the_first_to_go_where_memory_runs_out():
    source = (
        "import os\ndef score(completions, **_):\n"
        "    return [os.environ['JAX_PLATFORMS'] == 'cpu', int(open('/proc/self/oom_score_adj').read())]\n"
    )
    with open_pool(source) as pool:
        assert list(pool.map([([], ["a", "b"], {})], [5.0])) == [(0, ("scores", [1.0, 1000.0]))]
