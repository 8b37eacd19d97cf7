"""Verdicts on limits."""

import pytest

from trainer.bench.comparison import Comparison, Row
from trainer.bench.harness import Quartiles, Timing
from trainer.bench.limits import Limit, judge


def row(name: str, ratio: float | None, saved: int | None) -> Row:
    timing = None
    if ratio is not None:
        spread = Quartiles(low=0.0, median=ratio, high=99.0)
        timing = Timing(milliseconds=Quartiles(low=1.0, median=1.0, high=1.0), ratio=spread, runs=1)
    return Row(name=name, timing=timing, saved_bytes=saved)


def comparison(dtype: str, *rows: Row) -> Comparison:
    return Comparison(name="mlp", title="", dtype=dtype, reference=row("dense", 1.0, 200), rows=rows)


MEASURED = [
    comparison("fp32", row("other", 9.0, 900), row("ours", 1.2, 100)),
    comparison("bf16", row("ours", 1.4, None), row("absent", None, None)),
]


@pytest.mark.parametrize(
    ("limit", "measured", "met"),
    [
        (Limit(comparison="mlp", dtype="fp32", row="ours", bound=1.2), 1.2, True),
        (Limit(comparison="mlp", dtype="bf16", row="ours", bound=1.2), 1.4, False),
        (Limit(comparison="mlp", dtype="bf16", row="ours", sign=">=", bound=1.2), 1.4, True),
        (Limit(comparison="mlp", dtype="fp32", row="ours", sign=">=", bound=1.3), 1.2, False),
        (Limit(comparison="mlp", dtype="fp32", row="ours", quantity="saved", bound=0.6), 0.5, True),
        (Limit(comparison="mlp", dtype="bf16", row="ours", quantity="saved", bound=0.6), None, None),
        (Limit(comparison="mlp", dtype="bf16", row="absent", bound=1.2), None, None),
        (Limit(comparison="step", dtype="fp32", row="ours", bound=1.2), None, None),
    ],
)
def test_verdict(limit: Limit, measured: float | None, met: bool | None) -> None:
    (verdict,) = judge(MEASURED, [limit])
    assert (verdict.limit, verdict.measured, verdict.met) == (limit, measured, met)
