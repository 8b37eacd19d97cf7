"""Settings that make torch fast on CPUs, for a process that has not imported torch yet."""

import ctypes
import os
import sys
from collections.abc import Sequence
from fractions import Fraction

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def tune_process() -> None:
    """Keep freed memory in this process, and let oneDNN remember more kernels; what the user has set stays.

    glibc maps every tensor above 32 MB afresh and unmaps it when it is freed, so that each one pays page faults; other
    C libraries are left alone. oneDNN's default cache of 1024 compiled kernels is smaller than the shapes that expert
    layers produce in bf16; it is read when torch loads. The number of threads is no concern of this function: torch
    takes all cores that this process may use, and ranks divide them (`fair_threads`).
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    if sys.platform.startswith("linux") and not any(
        name.startswith(("MALLOC_MMAP", "MALLOC_TRIM")) for name in os.environ
    ):
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1; a scheduler may grant fewer than there are."""
    return len(usable_core_numbers())


def usable_core_numbers() -> set[int]:
    """Return the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def fair_threads(own: set[int], of_machine: Sequence[set[int]]) -> int:
    """Return how many threads a process may run so that each core is divided evenly among those that may use it.

    Args:
        own: cores of this process.
        of_machine: cores of each process on this machine, this one included.
    """
    return max(1, int(sum(Fraction(1, sum(core in cores for cores in of_machine)) for core in own)))
