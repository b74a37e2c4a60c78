"""One run as many processes, on as many hosts as there are: how they find each other, agree, and end.

Each process runs the same program. What they compute is spread over all of their devices (`sharding.py`); what is
done once, process 0 does: it alone prints and writes the run's folder.
"""

import atexit
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from glob import glob
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.errors import UserError

Value = TypeVar("Value")

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT_SECONDS = 30
"""After so long without a sign of life JAX takes a process for lost, and ends the others."""
MISSING = "error: process {} of {}: the others were not found at {}, or this one was killed; start all of them"
LOST = (
    "error: process {} of {} was ended before its run was: another process is gone or cannot be reached, or this one"
    " was killed; start all of them again, with --resume"
)


def start(told: str | None = None, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, if there are any: to be called once, before anything asks for a device.

    They are found by what is `told`, "address:port of process 0,processes,number of this one"; or else by
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which say the same; or else, where
    `jax.distributed.initialize()` knows how, in SLURM, under Open MPI's mpirun and on TPU hosts. Anywhere else nothing
    is done. Raises UserError for only some of the three and for numbers that are none. Where the others do not come
    within five minutes JAX ends this process, whose last line says so.
    """
    if jax.distributed.is_initialized():
        return
    values = told.split(",") if told else [environment.get(name, "") for name in VARIABLES]
    if not any(values):
        if in_cluster(environment):
            _initialize(None, None, None)
        return
    wanted = f"hosts {told!r}" if told else ", ".join(f"{n} {v!r}" for n, v in zip(VARIABLES, values, strict=True))
    if len(values) != len(VARIABLES) or not all(values):
        raise UserError(f"{wanted}: many processes need all three of process 0's address, their count and a number")
    address, count, number = values
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise UserError(f"{wanted}: of {count} processes none has the number {number}; they are 0, 1, … below that")
    if not address.rpartition(":")[2].isdecimal():
        raise UserError(f"{wanted}: the address of process 0 has a port, as in 10.0.0.1:8476")
    if int(count) > 1:
        _initialize(address, int(count), int(number))


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether `jax.distributed.initialize()` will find more than one process, or a TPU, whose hosts it counts.

    Nothing is asked for over a network, which on a laptop would take its time.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm) and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return True
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    wanted = environment.get("JAX_PLATFORMS") or "tpu"
    # jax sets TPU_SKIP_MDS_QUERY where it sees no TPU.
    alone = "TPU_SKIP_MDS_QUERY" in environment and "," not in environment.get("TPU_WORKER_HOSTNAMES", "")
    return "tpu" in wanted and not alone and bool(glob("/dev/accel[0-9]*") or glob("/dev/vfio/[0-9]*"))


def many() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return not many() or jax.process_index() == 0


def from_first(function: Callable[[], Value]) -> Value:
    """Calls function() in process 0 and returns its value, which JSON can hold, in all of them.

    Raises UserError in every process when it is raised in process 0.
    """
    if not many():
        return function()
    said = b""
    if first():
        try:
            said = json.dumps({"value": function()}).encode()
        except UserError as error:
            said = json.dumps({"error": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    data = np.frombuffer(said, np.uint8) if first() else np.zeros(size, np.uint8)
    heard = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8).tobytes())
    if "error" in heard:
        raise UserError(heard["error"])
    return heard["value"]


def gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers. A value is anything that JSON can hold."""
    return [json.loads(said) for said in gather_bytes(json.dumps(value).encode())] if many() else [value]


def gather_bytes(said: bytes) -> list[bytes]:
    """Bytes of all processes, in the order of their numbers."""
    if not many():
        return [said]
    sizes = multihost_utils.process_allgather(np.int32(len(said)))
    padded = np.pad(np.frombuffer(said, np.uint8), (0, int(sizes.max()) - len(said)))
    heard = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    return [row[:size].tobytes() for row, size in zip(heard, sizes, strict=True)]


def place() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    return (jax.process_index(), jax.process_count()) if many() else (0, 1)


def leave(code: int) -> NoReturn:
    """Ends the program. One of several processes does not wait for the others, which may be waiting for it."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(1)  # with process 0 JAX's service goes, and at once the others, who may have something to say
    _dismiss()
    os._exit(code)


def fail(error: Exception) -> NoReturn:
    """Ends one of several processes that met a bug, or what looks like one.

    Where another is lost, its closed connection may be noticed first; JAX finds out why, ends this one and has it say
    so, if given the time.
    """
    traceback.print_exception(error)
    # What is exchanged on the host fails as a ValueError.
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
        sys.stderr.flush()
        time.sleep(HEARTBEAT_SECONDS + 10)
    leave(1)


_sentinel: subprocess.Popen[bytes] | None = None


def _initialize(address: str | None, count: int | None, number: int | None) -> None:
    if address is not None:
        _watch(MISSING.format(number, count, address))
    try:
        jax.distributed.initialize(address, count, number, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the other processes cannot be found: {str(error).splitlines()[0]}") from error
    _dismiss()
    if many():
        _watch(LOST.format(jax.process_index(), jax.process_count()))
        from_first(lambda: None)  # a CPU's processes connect at their first exchange, and wait for 30 seconds only


def _watch(message: str) -> None:
    """Has a shell say the message if this process ends without `_dismiss`.

    Where another one is lost, JAX ends this one by abort(), after which nothing in it can speak.
    """
    global _sentinel
    command = ["/bin/sh", "-c", 'read -r done || echo "$1" >&2', "sh", message]
    _sentinel = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    atexit.register(_dismiss)


def _dismiss() -> None:
    global _sentinel
    if _sentinel is not None and _sentinel.stdin is not None:
        sentinel, _sentinel = _sentinel, None
        sentinel.communicate(b"done\n")
