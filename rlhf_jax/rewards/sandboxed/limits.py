"""The limits that a process in a sandbox sets itself, before anything that is not trusted runs in it."""

import os
import resource
from typing import NamedTuple


class Limits(NamedTuple):
    """The most that a process may take. No limit can be raised again."""

    cpu_seconds: int
    memory: int
    """Bytes of address space."""
    file_bytes: int
    """Size of a file, and of all that is in /tmp."""
    files: int
    """Open at the same time."""


def confine(limits: Limits) -> None:
    """Sets the limits, and lets standard input, output and error lead nowhere.

    A copy of standard error stays open: its end tells who reads it that this process has ended.
    """
    os.dup(2)
    for what, most in (
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.files),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    os.close(nowhere)
