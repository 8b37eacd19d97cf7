"""The plan and the index at the size of all of Taskonomy: 4.6 million samples in 4,600 shards, 13 tasks.

Every figure comes from a process of its own. Time is CPU time of that process. Memory is what stays: what the process
holds allocated, and for a plan the files of two epochs besides, as in a batch that spans both; all processes of a node
share them. Nothing of it depends on a precision, so it is measured with fp32 only.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_pipeline.index_file import INDEX_FILE
from trainer.bench.comparison import Comparison, Row, Settings
from trainer.bench.harness import Timing, quartiles
from trainer.bench.plan_cost import TASKS, Cost, PlanCase, Size, copy_cost, open_cost, plan_cost, write_index

ALLOWED_SECONDS = 20.0
ALLOWED_BYTES = 64 << 20


PLANS = {
    "complete labels": PlanCase(True, 1, True),
    "complete, unequal shares": PlanCase(True, 1, False),
    "2000 label sets": PlanCase(False, 1, True),
    "2000 sets, unequal shares": PlanCase(False, 1, False),
    "2000 sets, 4 per image": PlanCase(False, 4, True),
    "2000 sets, quota": PlanCase(False, 0, True),
}


def compare_plan(settings: Settings, dtype: str) -> list[Comparison]:
    """Measure the plan's first epoch beside what is allowed, and opening the index beside making its table."""
    if dtype != "fp32":
        return []
    size = Size(20, 500) if settings.quick else Size(4600, 1000)
    with _one_process_each(settings.threads) as measure:
        return [_compare_plans(size, measure), _compare_index(size, measure)]


def _compare_plans(size: Size, measure: Callable[..., Any]) -> Comparison:
    allowed = Row(
        name="allowed", timing=_timing(ALLOWED_SECONDS, ALLOWED_SECONDS), saved_bytes=None, held_bytes=ALLOWED_BYTES
    )
    rows = []
    for name, case in PLANS.items():
        found = measure(plan_cost, size, case)
        rows.append(_row(name, found, ALLOWED_SECONDS))
    return Comparison(
        name="plan",
        title=f"the plan of {_words(size)}: its first epoch, and memory across two",
        dtype="fp32",
        reference=allowed,
        rows=tuple(rows),
    )


def _compare_index(size: Size, measure: Callable[..., Any]) -> Comparison:
    with tempfile.TemporaryDirectory(prefix="modsquad-bench-") as folder:
        index = Path(folder) / INDEX_FILE
        measure(write_index, size, index)
        made = measure(open_cost, index)
        opened = measure(open_cost, index)
        copied = measure(copy_cost, index)
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


def _words(size: Size) -> str:
    return f"{size.samples} samples in {size.shards} shards, {len(TASKS)} tasks"


def _row(name: str, measured: Cost, reference: float) -> Row:
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
