"""The limits that the project sets itself, and what was measured of them. A limit never fails a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.bench.comparison import Comparison


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One bound on a ratio of a row of a comparison to its reference.

    Attributes:
        comparison, dtype, row: where the ratio stands.
        quantity: time: the median of the time ratios; saved: bytes saved for backward.
        sign: whether the ratio should be at most or at least `bound`.
        bound: the limit.
    """

    comparison: str
    dtype: Literal["fp32", "bf16"]
    row: str
    quantity: Literal["time", "saved"] = "time"
    sign: Literal["<=", ">="] = "<="
    bound: float


LIMITS = (
    Limit(comparison="mlp", dtype="bf16", row="expert MLP", bound=1.20),
    Limit(comparison="mlp", dtype="fp32", row="expert MLP", bound=1.15),
    Limit(comparison="mlp", dtype="bf16", row="expert MLP", quantity="saved", bound=0.6),
    Limit(comparison="mlp", dtype="fp32", row="expert MLP", quantity="saved", bound=0.6),
    Limit(comparison="attention", dtype="bf16", row="expert attention", bound=1.25),
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
            if row.name == limit.row and row.timing and row.saved_bytes is not None:
                if limit.quantity == "time":
                    return row.timing.ratio.median
                return row.saved_bytes / (comparison.reference.saved_bytes or 1)
    return None
