"""The benchmark's tables for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from trainer.bench.comparison import Comparison, Row
from trainer.bench.limits import Verdict


def comparison_table(comparison: Comparison) -> Table:
    """Return one row per alternative: time, ratio to the reference with its quartiles, bytes saved for backward.

    A comparison of communication has the bytes that move instead, and of placements the work of the busiest rank over
    an even share; one of the plan the bytes that stay.
    """
    rows = (comparison.reference, *comparison.rows)
    notes = [f"{row.name}: {row.note}" for row in rows if row.note]
    table = Table(
        title=f"{comparison.title}, {comparison.dtype}",
        title_justify="left",
        caption="\n".join(notes) or None,
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    moves = any(row.moved_bytes is not None for row in rows)
    held = any(row.held_bytes is not None for row in rows)
    times = ("ms", "ratio", "quartiles", "held MB" if held else "saved MB", "ratio")
    busiest = any(row.busiest is not None for row in rows)
    for column in ("moved MB", "ratio", *(["busiest rank"] if busiest else [])) if moves else times:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        reference = comparison.reference
        if moves:
            load = [] if not busiest else ["" if row.busiest is None else f"{row.busiest:.2f}"]
            table.add_row(row.name, *_byte_cells(row.moved_bytes, reference.moved_bytes), *load)
        elif held:
            table.add_row(row.name, *_time_cells(row), *_byte_cells(row.held_bytes, reference.held_bytes))
        else:
            table.add_row(row.name, *_time_cells(row), *_byte_cells(row.saved_bytes, reference.saved_bytes))
    return table


def limits_table(verdicts: Sequence[Verdict]) -> Table:
    """Return one row per limit that was measured: its bound, the measurement, and whether it is met."""
    unknown = sum(verdict.measured is None for verdict in verdicts)
    table = Table(title="limits", title_justify="left", caption_justify="left")
    if unknown:
        table.caption = f"not measured: {unknown} limits of {len(verdicts)}"
    table.add_column("ratio to the reference")
    for column in ("limit", "measured", "verdict"):
        table.add_column(column, justify="right", no_wrap=True, min_width=8)
    for verdict in verdicts:
        if verdict.measured is None:
            continue
        limit = verdict.limit
        subject = limit.comparison if limit.quantity in ("moved", "load") else limit.row
        table.add_row(
            f"{subject}, {limit.dtype}, {limit.quantity}",
            f"{limit.sign} {limit.bound:.2f}",
            f"{verdict.measured:.2f}",
            "[green]met" if verdict.met else "[red]not met",
        )
    return table


def _time_cells(row: Row) -> list[str]:
    if row.timing is None:
        return ["", "", ""]
    ratio = row.timing.ratio
    spread = f"{ratio.low:.2f}-{ratio.high:.2f}" if ratio.low < ratio.high else ""
    milliseconds = row.timing.milliseconds.median
    return [f"{milliseconds:.{1 if milliseconds >= 10 else 2}f}", f"{ratio.median:.2f}", spread]


def _byte_cells(count: int | None, reference: int | None) -> list[str]:
    if count is None:
        return ["", ""]
    return [f"{count / 1e6:.1f}", f"{count / reference:.2f}" if reference else ""]
