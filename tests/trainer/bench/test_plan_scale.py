"""The part `plan` measures what it says it measures."""

import numpy as np
import pytest

from trainer.bench.comparison import Comparison, Settings
from trainer.bench.limits import judge
from trainer.bench.plan_cost import TASKS, measure
from trainer.bench.plan_scale import PLANS, compare_plan


@pytest.fixture(scope="module")
def comparisons() -> dict[str, Comparison]:
    return {comparison.name: comparison for comparison in compare_plan(Settings(quick=True), "fp32")}


def test_every_plan_stands_beside_what_is_allowed(comparisons: dict[str, Comparison]) -> None:
    plan = comparisons["plan"]
    assert [row.name for row in plan.rows] == list(PLANS)
    assert plan.reference.timing is not None
    assert plan.reference.timing.milliseconds.median == 20_000
    assert plan.reference.held_bytes == 64 * 2**20
    for row in plan.rows:
        assert row.timing is not None
        assert row.timing.ratio.median == pytest.approx(row.timing.milliseconds.median / 20_000)
    verdicts = [verdict for verdict in judge(list(comparisons.values())) if verdict.limit.comparison == "plan"]
    assert len(verdicts) == 2 * len(PLANS)
    assert all(verdict.met is not None for verdict in verdicts)


def test_the_generated_index_is_an_index(comparisons: dict[str, Comparison]) -> None:
    assert "10000 samples in 20 shards" in comparisons["index"].title
    assert len(TASKS) == 13


def test_memory_that_stays_is_told_from_memory_that_was_needed() -> None:
    def make() -> np.ndarray:
        large = np.ones(30 << 20, np.uint8)
        return large[: 10 << 20].copy()

    cost, made = measure(make)
    assert len(made) == 10 << 20
    assert 8 << 20 < cost.held_bytes < 14 << 20
    assert 35 << 20 < cost.peak_bytes < 50 << 20


def test_precision_changes_nothing() -> None:
    assert compare_plan(Settings(quick=True), "bf16") == []
