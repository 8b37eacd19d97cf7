"""Charts of a run: arrays in, one PNG out.

Shapes: T tasks, E experts, L layers, n logged steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering

from trainer.figure import BLUE, GREEN, ORANGE, Floats, curve, figure

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
    with figure(path, rows=2, columns=2, row_height=2.5) as (_, axes):
        loss, information, rate, throughput = axes
        curve(loss, progress.steps, progress.loss, BLUE)
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
        curve(throughput, progress.steps, progress.images_per_second, ORANGE)
        throughput.set_title("images per second")
        throughput.set_ylim(bottom=0)
        for axis in (rate, throughput):
            axis.set_xlabel("step")


def task_loss_chart(path: Path, steps: Floats, losses: Mapping[str, Floats]) -> None:
    """Draw one small loss curve per task, each on its own scale. `steps` and every loss are (n,)."""
    columns = min(_TASK_COLUMNS, len(losses))
    rows = math.ceil(len(losses) / columns)
    with figure(path, rows=rows, columns=columns, row_height=1.75) as (_, axes):
        for axis, (task, loss) in zip(axes, losses.items(), strict=False):
            curve(axis, steps, loss, BLUE)
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
    with figure(path, rows=rows, columns=columns, row_height=row_height) as (canvas, axes):
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
            bar = canvas.colorbar(image, ax=axes[: len(maps)], location="bottom", shrink=0.35, aspect=45, pad=0.02)
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
