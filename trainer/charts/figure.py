"""How the pictures of a run look: colours, style, and the context manager that every chart is drawn in.

Figures are transparent and drawn in a mid-grey ink, so that the same file reads on a light and on a dark page. Colours
are those of Okabe and Ito (categories), viridis and cividis (quantities), which colour-blind readers can tell apart.

Shapes: n logged steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.signal import savgol_filter

Floats = NDArray[np.float64]

INK = "#757d88"  # contrast of 4.1 to the cards of the page, both light and dark: no grey has much more to both
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
CATEGORIES = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9")  # one beyond the last starts again
PAGE = 10.0  # inches that fill a page
_RC: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "text.parse_math": False,  # a $ in the name of a run is no formula
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "savefig.transparent": True,
    "figure.dpi": 144,
    "savefig.dpi": 144,
}


@contextmanager
def figure(
    path: Path,
    *,
    rows: int,
    columns: int,
    row_height: float,
    width_ratios: Sequence[float] | None = None,
    width: float = PAGE,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a styled figure with `rows` x `columns` axes (flat, row by row) and save it to `path` afterwards.

    Args:
        path: PNG to write.
        rows, columns: of the grid of axes.
        row_height: inches per row.
        width_ratios: one relative width per column; None: all alike.
        width: inches.
    """
    with mpl.rc_context(_RC):
        # Figure without pyplot: no global state, no display, and nothing to close.
        canvas = Figure(figsize=(width, row_height * rows), layout="constrained")
        axes = list(canvas.subplots(rows, columns, squeeze=False, width_ratios=width_ratios).flat)
        yield canvas, axes
        canvas.savefig(path, format="png")


def curve(axis: Axes, steps: Floats, values: Floats, colour: str) -> None:
    """Plot the raw values faintly and, where there are enough of them, a smooth curve on top."""
    window = len(values) // 50  # a logged value is a mean over steps already
    if window < 2:
        axis.plot(steps, values, color=colour, marker="." if len(values) < 30 else None)
        return
    axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    axis.plot(steps, smooth(values, window), color=colour)


def smooth(values: Floats, window: int) -> Floats:
    """Return local straight-line fits over `window` values on either side (Savitzky-Golay of order 1), (n,) -> (n,).

    A line stays a line up to both ends, so neither a slope nor the last value bends the curve there. Gaps (values that
    are not finite) are bridged for their neighbours and stay gaps themselves. Fewer finite values than one window
    come back as they are.
    """
    index, finite = np.arange(len(values)), np.isfinite(values)
    if finite.sum() < 2 * window + 1:
        return values
    known = slice(index[finite][0], index[finite][-1] + 1)  # beyond it there is nothing to bridge to
    bridged = np.interp(index[known], index[finite], values[finite])
    smoothed = np.full_like(values, np.nan)
    smoothed[known] = savgol_filter(bridged, 2 * window + 1, polyorder=1)
    return np.where(finite, smoothed, np.nan)
