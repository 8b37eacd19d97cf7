"""The plan and the index at the size of all of Taskonomy: 4.6 million samples in 4,600 shards, 13 tasks.

Every figure comes from a process of its own. Time is CPU time of that process. Memory is what stays: what the process
holds allocated, and for a plan the files of two epochs besides, as in a batch that spans both; all processes of a node
share them. Nothing of it depends on a precision, so it is measured with fp32 only.
"""

import ctypes
import json
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from configs.tasks import resolve_tasks
from data_pipeline.index_cache import open_table
from data_pipeline.index_file import INDEX_FILE, IndexHead, format_index
from data_pipeline.labels import LabelTable, code_dtype
from data_pipeline.once import OncePlan
from data_pipeline.plan import Plan
from data_pipeline.quota import QuotaPlan
from trainer.bench.comparison import Comparison, Row, Settings
from trainer.bench.harness import Timing, quartiles

TASKS = tuple(spec.name for spec in resolve_tasks("taskonomy"))
PRESENT = np.array([1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15])
"""Part of the samples that have each task's label where labels are missing: about 2000 sets of labels."""
WINDOW = 8
BATCH = 52

ALLOWED_SECONDS = 20.0
ALLOWED_BYTES = 64 << 20


@dataclass(frozen=True)
class _Size:
    shards: int
    samples_per_shard: int

    @property
    def samples(self) -> int:
        return self.shards * self.samples_per_shard


@dataclass(frozen=True)
class _Case:
    """One plan to make: which labels exist, `tasks_per_image` of `OncePlan` (0: `QuotaPlan`), shares."""

    complete: bool
    tasks_per_image: int
    equal: bool


PLANS = {
    "complete labels": _Case(True, 1, True),
    "complete, unequal shares": _Case(True, 1, False),
    "2000 label sets": _Case(False, 1, True),
    "2000 sets, unequal shares": _Case(False, 1, False),
    "2000 sets, 4 per image": _Case(False, 4, True),
    "2000 sets, quota": _Case(False, 0, True),
}


@dataclass(frozen=True)
class _Measured:
    """Seconds of CPU time, bytes that stay, and the most that was resident meanwhile beyond what was before."""

    seconds: float
    held_bytes: int
    peak_bytes: int


def compare_plan(settings: Settings, dtype: str) -> list[Comparison]:
    """Measure the plan's first epoch beside what is allowed, and opening the index beside making its table."""
    if dtype != "fp32":
        return []
    size = _Size(20, 500) if settings.quick else _Size(4600, 1000)
    with _one_process_each(settings.threads) as measure:
        return [_compare_plans(size, measure), _compare_index(size, measure)]


def _compare_plans(size: _Size, measure: Callable[..., Any]) -> Comparison:
    allowed = Row(
        name="allowed", timing=_timing(ALLOWED_SECONDS, ALLOWED_SECONDS), saved_bytes=None, held_bytes=ALLOWED_BYTES
    )
    rows = []
    for name, case in PLANS.items():
        found = measure(_measure_plan, size, case)
        rows.append(_row(name, found, ALLOWED_SECONDS))
    return Comparison(
        name="plan",
        title=f"the plan of {_words(size)}: its first epoch, and memory across two",
        dtype="fp32",
        reference=allowed,
        rows=tuple(rows),
    )


def _compare_index(size: _Size, measure: Callable[..., Any]) -> Comparison:
    with tempfile.TemporaryDirectory(prefix="modsquad-bench-") as folder:
        index = Path(folder) / INDEX_FILE
        measure(_write_index, size, index)
        made = measure(_measure_open, index)
        opened = measure(_measure_open, index)
        copied = measure(_measure_copy, index)
        note = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.0f} MB" for path in sorted(Path(folder).iterdir()))
    return Comparison(
        name="index",
        title=f"the index of {_words(size)}, {len(TASKS) + 1} members each ({note})",
        dtype="fp32",
        reference=_row("make its table, once", made, made.seconds),
        rows=(
            _row("open it", opened, made.seconds),
            _row("open a worker's pickled copy", copied, made.seconds),
        ),
    )


def _words(size: _Size) -> str:
    return f"{size.samples} samples in {size.shards} shards, {len(TASKS)} tasks"


def _row(name: str, measured: _Measured, reference: float) -> Row:
    return Row(
        name=name,
        timing=_timing(measured.seconds, reference),
        saved_bytes=None,
        note=f"at most {measured.peak_bytes / 1e6:.0f} MB more resident meanwhile",
        held_bytes=measured.held_bytes,
    )


def _timing(seconds: float, reference: float) -> Timing:
    return Timing(milliseconds=quartiles([1e3 * seconds]), ratio=quartiles([seconds / reference]), runs=1)


@contextmanager
def _one_process_each(threads: int) -> Iterator[Callable[..., Any]]:
    """Yield a function that calls another in a new process, whose numerical libraries use so many threads."""

    def call(function: Callable[..., Any], *args: object) -> Any:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()

    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield call
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _measure_plan(size: _Size, case: _Case) -> _Measured:
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

    measured, plan = _measure(make)
    plan.slots(size.samples - BATCH // 2, BATCH)  # every sample has a label
    return _Measured(measured.seconds, measured.held_bytes + plan.shared_bytes, measured.peak_bytes)


def _write_index(size: _Size, index: Path) -> None:
    """Write an index of shards that need not exist, with the labels that `_measure_plan` has where some are missing."""
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


def _measure_open(index: Path) -> _Measured:
    return _measure(lambda: open_table(index))[0]


def _measure_copy(index: Path) -> _Measured:
    copy = pickle.dumps(open_table(index))
    return _measure(lambda: pickle.loads(copy))[0]


def _measure(make: Callable[[], Any]) -> tuple[_Measured, Any]:
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
    return _Measured(seconds, max(0, _memory("Anonymous") - own), max(0, peak - resident)), made


def _memory(name: str) -> int:
    """Return a figure of Linux's /proc/self/smaps_rollup in bytes."""
    return _kilobytes(Path("/proc/self/smaps_rollup"), name) * 1024


def _kilobytes(path: Path, name: str) -> int:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{path} says nothing of {name}: the memory of a process can be measured on Linux only")
