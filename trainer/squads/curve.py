"""The trade-off of extraction: squads of the same tasks at many thresholds, from every expert to only the K most used.

`SQUAD/curve.json` holds one summary per squad, `SQUAD/curve.png` their picture.
"""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import Field

from configs.atomic import write_text_atomically
from configs.errors import UserError
from model.extract import select_experts
from model.layer_routing import ExpertLayerInfo
from model.routing_stats import RoutingLedger
from trainer.run_files import Record, parse_json, read_text
from trainer.squads.export import CURVE_FILE
from trainer.squads.summary import SquadSummary

CURVE_FORMAT = "modsquad.curve.1"
MAX_POINTS = 12


class SquadCurve(Record):
    """Squads of the same tasks, thresholds ascending; no two keep the same experts.

    `threshold` is that of the squad that lies beside the file; it is one of the points.
    """

    threshold: float
    points: tuple[SquadSummary, ...] = Field(min_length=1)


def curve_thresholds(ledger: RoutingLedger, tasks: Sequence[str], layers: Sequence[ExpertLayerInfo]) -> list[float]:
    """Return the thresholds of a curve, ascending, each of another squad: at most `MAX_POINTS`.

    The set of kept experts changes only where the threshold passes an expert's largest share among the tasks. Between
    two such shares the shortest decimal number stands for all, as that is easy to type. The first is 0, which keeps
    every expert; the last is 1, which keeps the K that each task uses most, and no other. Of more than `MAX_POINTS`
    sets, those stay whose numbers of experts are spread most evenly.

    Args:
        ledger: the usage that selects the experts.
        tasks: names of the tasks that leave together.
        layers: the model's expert layers.
    """
    leaves: list[float] = []  # per expert that can leave: it does above this threshold
    for layer in layers:
        most_used = select_experts(ledger, tasks, [layer], threshold=1.0)[layer.name]
        shares = [ledger.share(layer.name, task).tolist() for task in tasks]
        leaves += [max(share[e] for share in shares) for e in range(layer.num_experts) if e not in most_used]
    levels = sorted(set(leaves))
    thresholds = [0.0, *(_shortest_decimal(low, high) for low, high in pairwise([*levels, 1.0]))]
    if len(thresholds) <= MAX_POINTS:
        return thresholds
    gone = np.array([0, *np.searchsorted(np.sort(leaves), levels, side="right")])
    spread = np.linspace(0, gone[-1], MAX_POINTS)
    return [thresholds[i] for i in sorted({int(np.abs(gone - target).argmin()) for target in spread})]


def _shortest_decimal(low: float, high: float) -> float:
    """Return the number in (low, high] with the fewest decimal places; the largest of those."""
    for places in range(17):
        scale = 10.0**places
        number = math.floor(high * scale) / scale
        if low < number <= high:
            return number
    return high


def write_curve(folder: Path, curve: SquadCurve) -> None:
    """Write curve.json.

    Raises:
        UserError: the folder cannot be written.
    """
    values = {"format": CURVE_FORMAT, **json.loads(curve.model_dump_json())}
    write_text_atomically(folder / CURVE_FILE, json.dumps(values, indent=2, allow_nan=False) + "\n")


def read_curve(folder: Path) -> SquadCurve | None:
    """Return the curve beside the squad in `folder`; None without one.

    Raises:
        UserError: curve.json is damaged or of another format.
    """
    path = folder / CURVE_FILE
    if not path.is_file():
        return None
    values = parse_json(read_text(path), str(path))
    if not isinstance(values, dict) or values.get("format") != CURVE_FORMAT:
        raise UserError(f"{path} holds no curve that this program reads ({CURVE_FORMAT}): extract with --curve again")
    return SquadCurve.from_values(values, str(path))
