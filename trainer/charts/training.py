"""Charts of training: arrays in, one PNG out.

Shapes: n logged steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

from trainer.charts.figure import BLUE, CATEGORIES, GREEN, ORANGE, Floats, curve, figure, smooth

_TASK_COLUMNS = 5
_COMPARED_COLUMNS = 4
_LINES = ("-", "--", ":", "-.")


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
class LossCurve:
    """A loss of one run, n logged steps.

    Attributes:
        name: of the run.
        place: (n,) where it was logged, in steps or images.
        loss: (n,); NaN where it is not known.
    """

    name: str
    place: Floats
    loss: Floats


def progress_chart(path: Path, progress: Progress) -> None:
    """Draw total loss, mutual information per layer if there is any, learning rate and throughput side by side."""
    names = list(progress.mutual_information)
    rows, columns = (2, 2) if names else (1, 3)
    with figure(path, rows=rows, columns=columns, row_height=2.5) as (_, axes):
        loss, *information, rate, throughput = axes
        curve(loss, progress.steps, progress.loss, BLUE)
        loss.set_title("total loss")

        colours = mpl.colormaps["viridis"](np.linspace(0.3, 0.9, len(names)))
        for axis in information:
            for name, colour in zip(names, colours, strict=True):
                style = "--" if "mlp" in name else "-"
                axis.plot(progress.steps, progress.mutual_information[name], style, color=colour, label=name)
            axis.set_title("mutual information of tasks and experts (nats)")
            axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=6.5, handlelength=2.4)

        rate.plot(progress.steps, progress.learning_rate, color=GREEN)
        rate.set_title("learning rate")
        rate.yaxis.set_major_formatter("{x:g}")
        curve(throughput, progress.steps, progress.images_per_second, ORANGE)
        throughput.set_title("images per second")
        throughput.set_ylim(bottom=0)
        for axis in axes[-columns:]:
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


def loss_comparison_chart(path: Path, panels: Mapping[str, Sequence[LossCurve]], unit: str) -> None:
    """Draw one panel per name, the same runs in each, smoothed; colours tell runs apart, then kinds of lines.

    Args:
        path: PNG to write.
        panels: title -> one curve per run, the runs in the same order everywhere.
        unit: of the curves' places.
    """
    columns = min(_COMPARED_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with figure(path, rows=rows, columns=columns, row_height=2.1) as (canvas, axes):
        for axis, (title, curves) in zip(axes, panels.items(), strict=False):
            for number, item in enumerate(curves):
                window = len(item.loss) // 50
                axis.plot(
                    item.place,
                    item.loss if window < 2 else smooth(item.loss, window),
                    _LINES[number // len(CATEGORIES) % len(_LINES)],
                    color=CATEGORIES[number % len(CATEGORIES)],
                )
            axis.set_title(title, fontsize=8.5)
            axis.tick_params(labelsize=7)
            axis.locator_params(nbins=4)
            axis.set_xlabel(unit, fontsize=7.5)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        # Not as labels of the lines: those that begin with _ are none to matplotlib.
        names = [item.name for item in next(iter(panels.values()))]
        canvas.legend(axes[0].get_lines(), names, loc="outside upper left", ncols=4)
