"""Charts of what the experts do: arrays in, one PNG out.

Shapes: T tasks, E experts, n layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.cluster.hierarchy import dendrogram

from trainer.charts.affinity import Affinity
from trainer.charts.figure import BLUE, INK, ORANGE, PAGE, Floats, figure
from trainer.run_files import Part, WeightKind

_MAP_COLUMNS = 4
# From orange through the page's own colour to blue, so that zero recedes on a light and on a dark page. Colour comes in
# faster near zero, where most cosines are.
_SIGNED = LinearSegmentedColormap.from_list(
    "signed",
    [
        (0.0, (ORANGE, 1.0)),
        (0.4, (ORANGE, 0.4)),
        (0.5, (ORANGE, 0.0)),
        (0.5, (BLUE, 0.0)),
        (0.6, (BLUE, 0.4)),
        (1.0, (BLUE, 1.0)),
    ],
)


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


@dataclass(frozen=True, kw_only=True)
class ConflictMap:
    """Cosines (T, T) of the tasks' gradients in some weights; NaN where unknown."""

    title: str
    cosine_TT: Floats


@dataclass(frozen=True, kw_only=True)
class ConflictCurve:
    """How some weights of a block fare over the depth of the model, n blocks.

    Attributes:
        kind, part: which weights.
        name: for the legend.
        block: (n,) numbers of the blocks.
        mean, share, strength: (n,) numbers of `gradient_conflict.Conflict`.
    """

    kind: WeightKind
    part: Part
    name: str
    block: Floats
    mean: Floats
    share: Floats
    strength: Floats


def expert_map_chart(path: Path, tasks: Sequence[str], order: Sequence[int], maps: Sequence[ExpertMap]) -> None:
    """Draw the share of each task's tokens per expert, one heat map per layer; a single one in large letters.

    Tasks stand in the given order in all layers; experts stand in each layer in the order of `expert_order`, so that a
    squad shows as a block near the diagonal. Experts keep their numbers on the axis.
    """
    columns = min(_MAP_COLUMNS, len(maps))
    rows = math.ceil(len(maps) / columns)
    alone = len(maps) == 1
    letters = 8.0 if alone else 7.0
    # Narrow enough for a phone, wide enough for the numbers of the experts.
    width = max(4.2, 1.8 + 0.16 * maps[0].share_TE.shape[1]) if alone else PAGE
    row_height = 0.45 + (0.23 if alone else 0.19) * len(tasks) + 0.7 / rows  # titles, tasks, a part of the colour bar
    with figure(path, rows=rows, columns=columns, row_height=row_height, width=width) as (canvas, axes):
        image = None
        for index, (axis, item) in enumerate(zip(axes, maps, strict=False)):
            share_TE = item.share_TE[list(order)]
            order_E = expert_order(share_TE)
            image = axis.imshow(share_TE[:, order_E], cmap="cividis", vmin=0, vmax=1, aspect="auto")
            axis.set_title(f"{item.layer}   I = {item.mutual_information:.2f}", fontsize=letters + 1.5)
            axis.set_xticks(range(len(order_E)), [str(expert) for expert in order_E], fontsize=letters - 1.5)
            _name_rows(axis, [tasks[t] for t in order], show=index % columns == 0, letters=letters)
        for axis in axes[len(maps) :]:
            axis.set_visible(False)
        if image is not None:
            shrink, aspect = (0.7, 30) if alone else (0.35, 45)
            bar = canvas.colorbar(
                image, ax=axes[: len(maps)], location="bottom", shrink=shrink, aspect=aspect, pad=0.02
            )
            bar.outline.set_visible(False)
            bar.set_label("share of the task's tokens")


def affinity_chart(path: Path, affinity: Affinity) -> None:
    """Draw the tree of two or more tasks and, row by row beside its leaves, the affinity of each pair in percent."""
    names = [affinity.tasks[t] for t in affinity.order]
    shown_TT = _off_diagonal(affinity.affinity_TT, affinity.order)
    with figure(path, rows=1, columns=2, row_height=1.3 + 0.26 * len(names), width_ratios=(1, 3.2)) as (_, axes):
        tree, matrix = axes
        branches = dendrogram(affinity.tree, no_plot=True)
        for heights, places in zip(branches["dcoord"], branches["icoord"], strict=True):
            # scipy puts leaf i at 10 i + 5.
            tree.plot(1 - np.array(heights), (np.array(places) - 5) / 10, color=INK, linewidth=1.2)
        tree.set_ylim(len(names) - 0.5, -0.5)
        tree.set_xlim(right=1)
        tree.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        tree.set_xlabel("affinity at which they join", fontsize=8)
        tree.tick_params(labelsize=7)
        tree.set_yticks([])
        tree.spines["left"].set_visible(False)

        largest = float(np.nanmax(shown_TT, initial=0.01))
        matrix.imshow(shown_TT, cmap="cividis", vmin=0, vmax=largest, aspect="auto")
        for row, column in np.argwhere(np.isfinite(shown_TT)):
            value = shown_TT[row, column]
            colour = "black" if value > 0.55 * largest else "white"  # on the bright part of the colours, on the dark
            matrix.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7)
        _name_rows(matrix, names, show=True)
        matrix.set_xticks(range(len(names)), names, fontsize=7, rotation=40, ha="right", rotation_mode="anchor")


def conflict_curve_chart(path: Path, curves: Sequence[ConflictCurve], trunk: int) -> None:
    """Draw the numbers of a conflict over the depth of the model, the first `trunk` blocks shaded."""
    with figure(path, rows=1, columns=3, row_height=2.7) as (canvas, axes):
        panels = {"mean cosine": "mean", "conflicting pairs": "share", "strength of conflict": "strength"}
        for axis, (title, number) in zip(axes, panels.items(), strict=True):
            for item in curves:
                axis.plot(
                    item.block,
                    getattr(item, number),
                    "-" if item.part == "attention" else "--",
                    color=ORANGE if item.kind == "experts" else BLUE,
                    marker="o" if item.part == "attention" else "s",
                    markersize=3.5,
                    label=item.name,
                )
            if trunk:
                axis.axvspan(-0.5, trunk - 0.5, color=INK, alpha=0.12, linewidth=0, label="run once per image")
            axis.set_title(title)
            axis.set_xlabel("block")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].axhline(0, color=INK, linewidth=0.8)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        for axis in axes[1:]:
            axis.set_ylim(bottom=0)
        canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(curves) + 1)


def conflict_map_chart(
    path: Path, tasks: Sequence[str], order: Sequence[int], rows: Sequence[Sequence[ConflictMap | None]]
) -> None:
    """Draw the cosines of every pair of tasks, one matrix per map, in rows of equal length; None leaves a gap.

    One scale for all: that of the largest cosine of two tasks. Diagonals, 1 by definition, stay empty.
    """
    names = [tasks[t] for t in order]
    maps = [item for row in rows for item in row]
    shown = [None if item is None else _off_diagonal(item.cosine_TT, order) for item in maps]
    limit = max((np.nanmax(np.abs(x), initial=0.0) for x in shown if x is not None), default=0.0) or 1.0
    columns = len(rows[0])
    row_height = 0.45 + 0.16 * len(tasks) + 1.6 / len(rows)  # title, tasks, and a part of the names and the colour bar
    with figure(path, rows=len(rows), columns=columns, row_height=row_height) as (canvas, axes):
        image = None
        for index, (axis, item, cosine_TT) in enumerate(zip(axes, maps, shown, strict=True)):
            if item is None or cosine_TT is None:
                axis.set_visible(False)
                continue
            image = axis.imshow(cosine_TT, cmap=_SIGNED, vmin=-limit, vmax=limit, aspect="auto")
            axis.set_title(item.title, fontsize=8.5)
            _name_rows(axis, names, show=index % columns == 0)
            below = names if index // columns == len(rows) - 1 else []
            axis.set_xticks(range(len(below)), below, fontsize=6, rotation=90)
            _rule_cells(axis, len(names))
        if image is not None:
            bar = canvas.colorbar(image, ax=axes, location="bottom", shrink=0.35, aspect=45, pad=0.02)
            bar.locator = MaxNLocator(nbins=5, symmetric=True)
            bar.outline.set_edgecolor(INK)
            bar.outline.set_linewidth(0.5)
            bar.set_label("conflict   \N{LEFTWARDS ARROW}   cosine of the gradients   \N{RIGHTWARDS ARROW}   agreement")


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


def _off_diagonal(matrix_TT: Floats, order: Sequence[int]) -> Floats:
    """Return a matrix of pairs of tasks in the given order, NaN where a task meets itself."""
    return np.where(np.eye(len(order)), np.nan, matrix_TT[np.ix_(order, order)])


def _name_rows(axis: Axes, names: Sequence[str], *, show: bool, letters: float = 7.0) -> None:
    """Turn an axis into a bare matrix whose rows have names, if they are to be shown."""
    axis.set_yticks(range(len(names)), names if show else [""] * len(names), fontsize=letters)
    axis.tick_params(length=0)
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _rule_cells(axis: Axes, count: int) -> None:
    """Draw faint lines between the cells of a matrix, so that those near zero can be told apart."""
    edges = np.arange(count + 1) - 0.5
    for lines in (axis.hlines, axis.vlines):
        lines(edges, -0.5, count - 0.5, color=INK, alpha=0.25, linewidth=0.5)
