"""What a plan and an index cost a process: each function runs in one of its own.

Time is the process' CPU time. Memory is read from Linux.
"""

import ctypes
import json
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.tasks import resolve_tasks
from data_pipeline.index_cache import open_table
from data_pipeline.index_file import IndexHead, format_index
from data_pipeline.planning.labels import LabelTable, code_dtype
from data_pipeline.planning.once import OncePlan
from data_pipeline.planning.plan import Plan
from data_pipeline.planning.quota import QuotaPlan

TASKS = tuple(spec.name for spec in resolve_tasks("taskonomy"))
PRESENT = np.array([1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15])
"""Part of the samples that have each task's label where labels are missing: about 2000 sets of labels."""
WINDOW = 8
BATCH = 52


@dataclass(frozen=True)
class Size:
    """Of a dataset."""

    shards: int
    samples_per_shard: int

    @property
    def samples(self) -> int:
        """Of all shards."""
        return self.shards * self.samples_per_shard


@dataclass(frozen=True)
class PlanCase:
    """One plan to make: which labels exist, `tasks_per_image` of `OncePlan` (0: `QuotaPlan`), shares."""

    complete: bool
    tasks_per_image: int
    equal: bool


@dataclass(frozen=True)
class Cost:
    """Seconds of CPU time, bytes that stay, and the most that was resident meanwhile beyond what was before."""

    seconds: float
    held_bytes: int
    peak_bytes: int


def plan_cost(size: Size, case: PlanCase) -> Cost:
    """Make a plan up to its first batch; its memory is that of a batch that spans two epochs."""
    shard_of = np.repeat(np.arange(size.shards, dtype=np.int32), size.samples_per_shard)
    stored = np.zeros(size.samples, code_dtype(len(TASKS)))
    rng = np.random.default_rng(0)
    for task, part in enumerate(PRESENT):
        has = True if case.complete else rng.random(size.samples) < part
        stored |= np.asarray(has, stored.dtype) << stored.dtype.type(task)
    labels = LabelTable(stored, range(len(TASKS)))
    shares = [1.0] * len(TASKS) if case.equal else rng.uniform(0.2, 2.0, len(TASKS)).tolist()

    def make() -> Plan:
        plan: Plan
        if case.tasks_per_image:
            plan = OncePlan(
                shard_of, labels, seed=0, tasks_per_image=case.tasks_per_image, shares=shares, window=WINDOW
            )
        else:
            plan = QuotaPlan(shard_of, labels, seed=0, shares=shares, window=WINDOW, task_names=TASKS)
        plan.slots(0, BATCH)
        return plan

    measured, plan = measure(make)
    plan.slots(size.samples - BATCH // 2, BATCH)  # every sample has a label
    return Cost(measured.seconds, measured.held_bytes + plan.shared_bytes, measured.peak_bytes)


def write_index(size: Size, index: Path) -> None:
    """Write an index of shards that need not exist, with labels as `plan_cost` has where some are missing."""
    rng = np.random.default_rng(0)
    names = ["rgb.png", *(f"{task}.png" for task in TASKS)]

    def entries() -> Iterator[str]:
        for shard in range(size.shards):
            count = size.samples_per_shard
            there = rng.random((count, len(names))) < [1.0, *PRESENT]
            bytes_of = np.where(there, rng.integers(2_000, 90_000, there.shape), 0)
            blocks = np.where(there, 1 + -(-bytes_of // 512), 0)  # a tar's header, and data in blocks
            ends = np.cumsum(blocks).reshape(there.shape)
            offsets = np.where(there, (ends - blocks + 1) * 512, -1)
            yield json.dumps(
                {
                    "file": f"{shard:06}.tar",
                    "file_bytes": int(ends[-1, -1] + 2) * 512,
                    "sha256": f"{shard:064x}",
                    "side": 256,
                    "keys": [f"building{shard:04}/point_{row}_view_0" for row in range(count)],
                    "members": {
                        name: {"offset": offsets[:, column].tolist(), "size": bytes_of[:, column].tolist()}
                        for column, name in enumerate(names)
                    },
                },
                separators=(",", ":"),
            )

    with index.open("w", encoding="utf-8") as file:
        file.writelines(format_index(IndexHead(side=256, tasks=TASKS), entries()))


def open_cost(index: Path) -> Cost:
    """Open an index.json; the first to do so makes its table."""
    return measure(lambda: open_table(index))[0]


def copy_cost(index: Path) -> Cost:
    """Open the copy of an index that a worker gets."""
    copy = pickle.dumps(open_table(index))
    return measure(lambda: pickle.loads(copy))[0]


def measure(make: Callable[[], Any]) -> tuple[Cost, Any]:
    """Return the cost of `make`, and what it made, which is alive while the memory is read.

    Memory that was freed, but that glibc keeps for later, does not stay.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
    trim(0)
    own, resident = _memory("Anonymous"), _memory("Rss")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
    begin = time.process_time()
    made = make()
    seconds = time.process_time() - begin
    trim(0)
    peak = _kilobytes(Path("/proc/self/status"), "VmHWM") * 1024
    return Cost(seconds, max(0, _memory("Anonymous") - own), max(0, peak - resident)), made


def _memory(name: str) -> int:
    """Return a figure of Linux's /proc/self/smaps_rollup in bytes."""
    return _kilobytes(Path("/proc/self/smaps_rollup"), name) * 1024


def _kilobytes(path: Path, name: str) -> int:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{path} says nothing of {name}: the memory of a process can be measured on Linux only")
