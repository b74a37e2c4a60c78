"""How processes are found, and that nothing is asked where there is only one."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from rlhf_jax import hosts, sharding
from rlhf_jax.errors import UserError

ALL = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}  # fmt: skip
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.fixture
def started(monkeypatch):
    """What JAX was told, in place of its start."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    monkeypatch.setattr(hosts, "_watch", lambda message: None)
    return calls


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, []),
        (ALL, [("127.0.0.1:8476", 2, 1)]),
        (ALL | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, []),
        (SLURM, [(None, None, None)]),
        (SLURM | ALL, [("127.0.0.1:8476", 2, 1)]),
        (SLURM | {"SLURM_NTASKS": "1"}, []),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, []),  # sbatch without srun
        (OPEN_MPI, [(None, None, None)]),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, []),
    ],
)
def test_processes_are_found_where_there_are_some(environment, expected, started):
    hosts.start(None, environment)
    assert started == expected


def test_until_all_are_there_the_last_line_says_that_they_were_not_found(monkeypatch, started):
    said = []
    monkeypatch.setattr(hosts, "_watch", said.append)
    monkeypatch.setattr(hosts, "many", lambda: True)
    monkeypatch.setattr(hosts, "from_first", lambda function: said.append("met"))
    hosts.start(None, ALL)
    assert said == [hosts.MISSING.format("1", 2, "127.0.0.1:8476"), hosts.LOST.format(0, 1), "met"]


def test_a_tpu_host_asks_for_the_others(monkeypatch, started):
    monkeypatch.setattr(hosts, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    hosts.start(None, {"TPU_SKIP_MDS_QUERY": "1"})
    hosts.start(None, {"JAX_PLATFORMS": "cpu"})
    assert started == []
    hosts.start(None, {})
    hosts.start(None, {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"})
    assert started == [(None, None, None)] * 2


def test_a_flag_comes_before_the_environment(started):
    hosts.start("10.0.0.1:1,4,3", ALL | SLURM)
    assert started == [("10.0.0.1:1", 4, 3)]


@pytest.mark.parametrize(
    "told, changes, message",
    [
        (None, {"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID '': many processes need all three"),
        (None, {"JAX_PROCESS_ID": "2"}, "of 2 processes none has the number 2"),
        (None, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES 'two', .*: of two processes"),
        (None, {"JAX_COORDINATOR_ADDRESS": "127.0.0.1"}, "the address of process 0 has a port"),
        ("10.0.0.1:1,4", {}, "hosts '10.0.0.1:1,4': many processes need all three"),
        ("10.0.0.1:1,4,-1", {}, "none has the number -1"),
    ],
)
def test_half_of_it_is_a_users_mistake(told, changes, message, started):
    with pytest.raises(UserError, match=message):
        hosts.start(told, ALL | changes)
    assert started == []


def test_one_process_is_the_first_and_agrees_with_itself():
    assert hosts.first() and not hosts.many()
    assert hosts.from_first(lambda: [1]) == [1]


@pytest.mark.parametrize(("numbers", "calls"), [([0, 1], [0, 1]), ([1, 0, 1, 0], [0, 1]), ([0, 0, 0], [0])])
def test_each_share_is_taken_once_by_the_first_process_that_has_it(numbers, calls, monkeypatch):
    """Processes as threads, which wait for each other where processes would."""
    here, called, said = threading.local(), [], [None] * len(numbers)
    barrier = threading.Barrier(len(numbers), timeout=20)

    def gather(value):
        said[here.process] = value
        barrier.wait()
        heard = list(said)
        barrier.wait()
        return heard

    def function(item):
        called.append((here.process, item))
        if item == "bad":
            raise UserError("of one share")
        return f"score of {item}"

    monkeypatch.setattr(sharding, "host_share", lambda: (numbers[here.process], len(calls)))
    monkeypatch.setattr(sharding, "gather", gather)
    monkeypatch.setattr(jax, "process_index", lambda: here.process)

    def run(process, items):
        here.process = process
        try:
            return sharding.in_shares(function, items)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(numbers)) as threads:
        good = list(threads.map(run, range(len(numbers)), [[f"share {i}" for i in calls]] * len(numbers)))
        assert good == [[f"score of share {i}" for i in calls]] * len(numbers)
        assert sorted(called) == sorted((numbers.index(i), f"share {i}") for i in calls)
        bad = list(threads.map(run, range(len(numbers)), [["bad", "good"][: len(calls)]] * len(numbers)))
        assert bad == ["of one share"] * len(numbers)
