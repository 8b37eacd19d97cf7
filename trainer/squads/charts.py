"""Picture of a squad's trade-off: what each threshold keeps, and what that costs.

Shape: n points of the curve.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from trainer.charts.figure import CATEGORIES, INK, Floats, figure
from trainer.squads.curve import SquadCurve
from trainer.squads.summary import SquadScore


def curve_chart(path: Path, curve: SquadCurve) -> None:
    """Draw three panels side by side; a ring marks the squad that was written.

    Experts kept over the threshold; per task, what the metric gains (below 0 it gets worse) and the share of tokens and
    images that stay unaffected, both over the parameters.
    """
    points = curve.points
    chosen = [point.threshold for point in points].index(curve.threshold)
    percent = _series(100 * point.threshold for point in points)
    millions = _series(point.parameters_after / 1e6 for point in points)
    with figure(path, rows=1, columns=3, row_height=3.0) as (_, axes):
        size, gain, unaffected = axes
        _line(size, percent, _series(point.experts[0] for point in points), chosen, INK)
        size.set_xscale("symlog", linthresh=1.0)
        size.xaxis.set_major_formatter("{x:g}")
        size.set_xlabel("threshold (% of a task's tokens)")
        size.set_title(f"experts kept, of {points[0].experts[1]}")
        size.set_ylim(bottom=0)

        gain.axhline(0, color=INK, linewidth=0.8)
        for number, task in enumerate(points[0].tasks):
            colour = CATEGORIES[number % len(CATEGORIES)]
            scores = [point.scores[number] for point in points]
            _line(gain, millions, _series(map(_gain, scores)), chosen, colour, label=f"{task} ({scores[0].metric})")
            tokens = _series(100 * score.unaffected_tokens for score in scores)
            images = _series(100 * score.unaffected_images for score in scores)
            _line(unaffected, millions, tokens, chosen, colour)
            unaffected.plot(millions, images, "--", color=colour)
        for style, name in (("-", "tokens"), ("--", "images")):
            unaffected.plot([], [], style, color=INK, label=name)
        gain.set_title("gain in the metric (%)")
        unaffected.set_title("unaffected (%)")
        unaffected.set_ylim(-3, 103)
        for axis in (gain, unaffected):
            axis.legend()
            axis.set_xlabel("parameters (millions)")
            axis.xaxis.set_major_locator(MaxNLocator(5))


def _gain(score: SquadScore) -> float:
    """Return the relative change in percent, positive for the better."""
    return 100 * score.relative_change * (1 if score.higher_is_better else -1)


def _series(values: Iterable[float]) -> Floats:
    """Return the values as an array (n,)."""
    return np.array(list(values), dtype=np.float64)


def _line(axis: Axes, x: Floats, y: Floats, chosen: int, colour: str, label: str | None = None) -> None:
    """Plot the points of a curve and put a ring around the chosen one."""
    axis.plot(x, y, color=colour, marker=".", label=label)
    axis.plot(x[chosen], y[chosen], "o", markersize=9, markerfacecolor="none", markeredgecolor=colour)
