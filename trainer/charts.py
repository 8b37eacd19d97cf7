"""Charts of a run: arrays in, one PNG out.

Figures are transparent and drawn in a mid-grey ink, so that the same file reads on a light and on a dark page. Colours
are those of Okabe and Ito (categories), viridis and cividis (quantities), which colour-blind readers can tell apart.

Shapes: T tasks, E experts, L layers, n logged steps.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.signal import savgol_filter

Floats = NDArray[np.float64]

INK = "#6e7681"  # contrast of at least 3.9 to both white and near-black
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
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
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "savefig.transparent": True,
    "figure.dpi": 144,
    "savefig.dpi": 144,
}
_WIDTH = 10.0  # inches
_TASK_COLUMNS = 5
_MAP_COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run logged, n steps.

    Attributes:
        steps: (n,) optimizer steps.
        loss: (n,) total loss.
        mutual_information: layer -> (n,) I(T;E) in nats.
        learning_rate: (n,).
        images_per_second: (n,) throughput over all ranks.
    """

    steps: Floats
    loss: Floats
    mutual_information: Mapping[str, Floats]
    learning_rate: Floats
    images_per_second: Floats


@dataclass(frozen=True, kw_only=True)
class ExpertMap:
    """Who uses whom in one expert layer.

    Attributes:
        layer: its name.
        share_TE: (T, E) share in [0, 1] of each task's tokens that chose each expert; a row sums to top-k. NaN where
            the task sent no tokens.
        mutual_information: I(T;E) of the layer in nats.
    """

    layer: str
    share_TE: Floats
    mutual_information: float


def progress_chart(path: Path, progress: Progress) -> None:
    """Draw total loss, mutual information per layer, learning rate and throughput side by side."""
    with _figure(path, rows=2, columns=2, row_height=2.5) as (_, axes):
        loss, information, rate, throughput = axes
        _curve(loss, progress.steps, progress.loss, BLUE)
        loss.set_title("total loss")

        names = list(progress.mutual_information)
        colours = mpl.colormaps["viridis"](np.linspace(0.3, 0.9, max(len(names), 1)))
        for name, colour in zip(names, colours, strict=False):
            style = "--" if "mlp" in name else "-"
            information.plot(progress.steps, progress.mutual_information[name], style, color=colour, label=name)
        information.set_title("mutual information of tasks and experts (nats)")
        if names:
            information.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=6.5, handlelength=2.4)

        rate.plot(progress.steps, progress.learning_rate, color=GREEN)
        rate.set_title("learning rate")
        rate.yaxis.set_major_formatter("{x:g}")
        _curve(throughput, progress.steps, progress.images_per_second, ORANGE)
        throughput.set_title("images per second")
        throughput.set_ylim(bottom=0)
        for axis in (rate, throughput):
            axis.set_xlabel("step")


def task_loss_chart(path: Path, steps: Floats, losses: Mapping[str, Floats]) -> None:
    """Draw one small loss curve per task, each on its own scale. `steps` and every loss are (n,)."""
    columns = min(_TASK_COLUMNS, len(losses))
    rows = math.ceil(len(losses) / columns)
    with _figure(path, rows=rows, columns=columns, row_height=1.75) as (_, axes):
        for axis, (task, loss) in zip(axes, losses.items(), strict=False):
            _curve(axis, steps, loss, BLUE)
            axis.set_title(task, fontsize=8.5)
            axis.tick_params(labelsize=7)
            axis.locator_params(nbins=4)
        for axis in axes[len(losses) :]:
            axis.set_visible(False)


def expert_map_chart(path: Path, tasks: Sequence[str], maps: Sequence[ExpertMap]) -> None:
    """Draw the share of each task's tokens per expert, one heat map per layer.

    Tasks stand in one order for all layers (similar users of experts are neighbours); experts stand in each layer in
    the order of `expert_order`, so that a squad shows as a block near the diagonal. Experts keep their numbers on the
    axis.
    """
    order_T = task_order([item.share_TE for item in maps])
    columns = min(_MAP_COLUMNS, len(maps))
    rows = math.ceil(len(maps) / columns)
    row_height = 0.45 + 0.19 * len(tasks) + 0.7 / rows  # titles, tasks, and the colour bar's part
    with _figure(path, rows=rows, columns=columns, row_height=row_height) as (figure, axes):
        image = None
        for index, (axis, item) in enumerate(zip(axes, maps, strict=False)):
            share_TE = item.share_TE[order_T]
            order_E = expert_order(share_TE)
            image = axis.imshow(share_TE[:, order_E], cmap="cividis", vmin=0, vmax=1, aspect="auto")
            axis.set_title(f"{item.layer}   I = {item.mutual_information:.2f}", fontsize=8.5)
            axis.set_xticks(range(len(order_E)), [str(expert) for expert in order_E], fontsize=5.5)
            first = index % columns == 0
            axis.set_yticks(range(len(tasks)), [tasks[t] for t in order_T] if first else [], fontsize=7)
            axis.tick_params(length=0)
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set_visible(False)
        for axis in axes[len(maps) :]:
            axis.set_visible(False)
        if image is not None:
            bar = figure.colorbar(image, ax=axes[: len(maps)], location="bottom", shrink=0.35, aspect=45, pad=0.02)
            bar.outline.set_visible(False)
            bar.set_label("share of the task's tokens")


def task_order(shares: Sequence[Floats]) -> list[int]:
    """Return the tasks so that neighbours use similar experts.

    Average-linkage clustering of the tasks' concatenated rows, leaves ordered to minimise the distance of neighbours
    (Bar-Joseph et al., Bioinformatics 2001).

    Args:
        shares: (T, E) per layer; NaN counts as 0.
    """
    rows = np.nan_to_num(np.concatenate(shares, axis=1))
    if len(rows) < 3:
        return list(range(len(rows)))
    tree = linkage(rows, method="average")
    return [int(task) for task in leaves_list(optimal_leaf_ordering(tree, rows))]


def expert_order(share_TE: Floats) -> list[int]:
    """Return the experts sorted by the mean position of the tasks that use them; unused experts come last.

    Args:
        share_TE: (T, E), rows already in display order; NaN counts as 0.
    """
    share_TE = np.nan_to_num(share_TE)
    total_E = share_TE.sum(axis=0)
    position_E = np.full(len(total_E), np.inf)
    moment_E = np.arange(len(share_TE)) @ share_TE
    np.divide(moment_E, total_E, out=position_E, where=total_E > 0)
    return [int(expert) for expert in np.argsort(position_E, kind="stable")]


@contextmanager
def _figure(path: Path, *, rows: int, columns: int, row_height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a styled figure with `rows` x `columns` axes (flat, row by row) and save it to `path` afterwards."""
    with mpl.rc_context(_RC):
        # Figure without pyplot: no global state, no display, and nothing to close.
        figure = Figure(figsize=(_WIDTH, row_height * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        yield figure, axes
        figure.savefig(path, format="png")


def _curve(axis: Axes, steps: Floats, values: Floats, colour: str) -> None:
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
