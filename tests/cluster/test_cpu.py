"""Freed memory stays in the process, unless the user has said otherwise."""

import os
import subprocess
import sys

import pytest

from cluster.cpu import fair_threads

PROGRAM = """
import resource
from cluster.cpu import tune_process
tune_process()
import torch
ones = torch.ones(20_000_000)
for _ in range(20):  # until the heap has found its places
    ones + 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    ones + 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_large_tensors_cost_page_faults_once() -> None:
    def faults(**environment: str) -> int:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env={**kept, **environment}, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults() < 1000
    assert faults(MALLOC_MMAP_THRESHOLD_="1000000") > 50_000, "the user decides"


def test_processes_of_a_machine_divide_the_cores_that_they_share() -> None:
    everything = set(range(6))
    assert fair_threads(everything, [everything]) == 6
    assert fair_threads(everything, [everything] * 3) == 2
    assert fair_threads({0, 1}, [{0, 1}, {2, 3}]) == 2, "bound to their own cores"
    assert fair_threads({0}, [{0}] * 4) == 1
