"""The system calls that a program in a sandbox may not make, as a filter of the kernel's (seccomp, classic BPF).

A sandboxed program is one process: it may have threads and start no process. It may not look into other processes,
make namespaces, mount, or open sockets other than those of Unix, and it may not have memory that no limit counts.
"""

import platform
import struct
from typing import NamedTuple

from rlhf_jax.errors import UserError


class Machine(NamedTuple):
    """A processor's numbers of system calls."""

    audit: int
    clone: int
    socket: int
    refused: tuple[int, ...]


EVERYWHERE = (
    434, 438,  # pidfd_open, pidfd_getfd
    425,  # io_uring_setup
    428, 429, 430, 432, 442,  # open_tree, move_mount, fsopen, fsmount, mount_setattr
    447,  # memfd_secret
)  # fmt: skip
MACHINES = {
    "x86_64": Machine(0xC000003E, 56, 41, (
        57, 58,  # fork, vfork
        101, 310, 311,  # ptrace, process_vm_readv, process_vm_writev
        272, 308, 165, 166, 155, 161,  # unshare, setns, mount, umount2, pivot_root, chroot
        248, 249, 250,  # add_key, request_key, keyctl
        321, 298, 323,  # bpf, perf_event_open, userfaultfd
        319, 29, 68, 64, 240,  # memfd_create, shmget, msgget, semget, mq_open
    )),
    "aarch64": Machine(0xC00000B7, 220, 198, (
        117, 270, 271,
        97, 268, 40, 39, 41, 51,
        217, 218, 219,
        280, 241, 282,
        279, 194, 186, 190, 180,
    )),
}  # fmt: skip
CLONE3 = 435
CLONE_THREAD = 0x10000
AF_UNIX = 1

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE, UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16
"""Places in the kernel's description of a call (struct seccomp_data)."""


def filter_calls(machine: str | None = None) -> bytes:
    """The filter's program. Raises UserError on a processor whose calls are not known here."""
    name = machine or platform.machine()
    if name not in MACHINES:
        raise UserError(f"the sandbox knows the system calls of {' and '.join(MACHINES)}, not those of {name}")
    found = MACHINES[name]
    code = [
        (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, found.audit), (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL),  # x86's other table
        (EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, UNKNOWN),  # the C library then uses clone, whose flags can be read
        (EQUAL, 0, 4, found.clone),
        (LOAD, 0, 0, ARGUMENT), (ANY_BIT, 0, 1, CLONE_THREAD), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE),
        (EQUAL, 0, 4, found.socket),
        (LOAD, 0, 0, ARGUMENT), (EQUAL, 0, 1, AF_UNIX), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE),
    ]  # fmt: skip
    for number in (*found.refused, *EVERYWHERE):
        code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("<HBBI", *step) for step in code)
