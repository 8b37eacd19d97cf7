"""The limits that the project sets itself, and what was measured of them. A limit never fails a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.bench.comparison import DTYPES, Comparison, Row
from trainer.bench.data_reading import ALLOWED_MILLISECONDS, by_codecs_in_batches, by_pil
from trainer.bench.plan_scale import PLANS


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One bound on a ratio of a row of a comparison to its reference, or, of load, to an even share.

    Attributes:
        comparison, dtype, row: where the ratio stands.
        quantity: time: the median of the time ratios; saved: bytes saved for backward; moved: bytes between ranks;
            held: bytes that stay in memory; load: of the busiest rank.
        sign: whether the ratio should be at most or at least `bound`.
        bound: the limit.
    """

    comparison: str
    dtype: str
    row: str
    quantity: Literal["time", "saved", "moved", "held", "load"] = "time"
    sign: Literal["<=", ">="] = "<="
    bound: float


_TIME_AND_MEMORY: tuple[Literal["time", "held"], ...] = ("time", "held")

LIMITS = (
    Limit(comparison="mlp", dtype="bf16", row="expert MLP", bound=1.20),
    Limit(comparison="mlp", dtype="fp32", row="expert MLP", bound=1.15),
    Limit(comparison="mlp", dtype="bf16", row="expert MLP", quantity="saved", bound=0.6),
    Limit(comparison="mlp", dtype="fp32", row="expert MLP", quantity="saved", bound=0.6),
    Limit(comparison="attention", dtype="bf16", row="expert attention", bound=1.25),
    Limit(comparison="step", dtype="bf16", row="Mod-Squad", bound=1.30),
    Limit(comparison="step", dtype="fp32", row="Mod-Squad", bound=1.12),
    Limit(comparison="step by task", dtype="bf16", row="one pass per task", sign=">=", bound=1.60),
    Limit(comparison="step by task", dtype="fp32", row="one pass per task", sign=">=", bound=1.30),
    *(Limit(comparison="experts", dtype=dtype, row="E = 64", bound=1.25) for dtype in DTYPES),
    *(Limit(comparison="skew", dtype=dtype, row="60% of tokens on one expert", bound=1.1) for dtype in DTYPES),
    # Linear: four times the pairs keep at most four times the bytes.
    *(Limit(comparison="pairs", dtype=dtype, row="52 pairs", quantity="saved", bound=4.0) for dtype in DTYPES),
    *(
        Limit(comparison=f"comm ep {ranks}", dtype=dtype, row="exchange", quantity="moved", bound=1.05)
        for ranks in (2, 4, 8, 16)
        for dtype in DTYPES
    ),
    *(
        Limit(comparison="placement ep 4", dtype=dtype, row="task-affine, 2 shadowed", quantity="moved", bound=0.60)
        for dtype in DTYPES
    ),
    *(
        Limit(comparison=f"placement ep {n}", dtype=dtype, row="task-affine, 2 shadowed", quantity="load", bound=1.25)
        for n in (2, 4, 8)
        for dtype in DTYPES
    ),
    Limit(comparison="data, all tasks", dtype="fp32", row=by_pil("all tasks"), sign=">=", bound=6.0),
    Limit(comparison="data, one task", dtype="fp32", row=by_pil("one task"), sign=">=", bound=15.0),
    *(
        Limit(comparison=f"data, {which}", dtype="fp32", row=by_codecs_in_batches(which), sign=">=", bound=1.3)
        for which in ALLOWED_MILLISECONDS
    ),
    # The reference is what is allowed.
    *(
        Limit(comparison="plan", dtype="fp32", row=row, quantity=quantity, bound=1.0)
        for row in PLANS
        for quantity in _TIME_AND_MEMORY
    ),
    *(
        Limit(comparison=f"data loader, {which}", dtype="fp32", row=f"2 workers, {which}", bound=1.0)
        for which in ALLOWED_MILLISECONDS
    ),
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A limit and its measured value; None where it was not measured."""

    limit: Limit
    measured: float | None

    @property
    def met(self) -> bool | None:
        """Whether the limit holds; None: unknown."""
        if self.measured is None:
            return None
        if self.limit.sign == "<=":
            return self.measured <= self.limit.bound
        return self.measured >= self.limit.bound


def judge(comparisons: Sequence[Comparison], limits: Sequence[Limit] = LIMITS) -> list[Verdict]:
    """Return a verdict for every limit, in order.

    Args:
        comparisons: what was measured, at the sizes that the limits are about.
        limits: to judge.
    """
    return [Verdict(limit=limit, measured=_measured(comparisons, limit)) for limit in limits]


def _measured(comparisons: Sequence[Comparison], limit: Limit) -> float | None:
    for comparison in comparisons:
        if (comparison.name, comparison.dtype) != (limit.comparison, limit.dtype):
            continue
        for row in comparison.rows:
            if row.name == limit.row:
                return _MEASURES[limit.quantity](row, comparison.reference)
    return None


def _time(row: Row, _: Row) -> float | None:
    return row.timing.ratio.median if row.timing else None


def _saved(row: Row, reference: Row) -> float | None:
    return row.saved_bytes / reference.saved_bytes if row.saved_bytes and reference.saved_bytes else None


def _moved(row: Row, reference: Row) -> float | None:
    return row.moved_bytes / reference.moved_bytes if row.moved_bytes and reference.moved_bytes else None


def _held(row: Row, reference: Row) -> float | None:
    return row.held_bytes / reference.held_bytes if row.held_bytes is not None and reference.held_bytes else None


def _load(row: Row, _: Row) -> float | None:
    return row.busiest


_MEASURES = {"time": _time, "saved": _saved, "moved": _moved, "held": _held, "load": _load}
