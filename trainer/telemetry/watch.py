"""`modsquad watch`: how a run is doing, in the terminal, from its folder and from what rank 0 serves.

Losses are those of metrics.jsonl. Loads of experts come from the metrics that rank 0 serves while it trains
(`trainer.telemetry.prometheus`), else from the latest routing ledger, that is from the latest evaluation.
"""

import json
import math
import socket
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families
from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text

from trainer.run_files import StepRecord, read_latest_ledger, read_steps
from trainer.telemetry.prometheus import TARGETS
from trainer.telemetry.run_progress import RunProgress, describe_seconds, read_progress

_ANSWER_SECONDS = 2.0
_TREND_LINES = 10
_HOTTEST = 4.0  # times the even load; more looks the same

Loads = Mapping[tuple[int, str], Sequence[float]]
"""(block, kind) -> each expert's choices over the layer's mean."""


@dataclass(frozen=True)
class _ExpertLoads:
    source: str
    loads: Loads


def watch(run_dir: Path, *, refresh_seconds: float, console: Console) -> None:
    """Show the run until it has finished all its steps, or the user has seen enough.

    Raises:
        UserError: the folder is no run, or a file of it does not parse.
    """
    with Live(draw(run_dir), console=console, auto_refresh=False) as live:
        try:
            while not read_progress(run_dir).is_done:
                time.sleep(refresh_seconds)
                live.update(draw(run_dir), refresh=True)
        except KeyboardInterrupt:
            return


def draw(run_dir: Path) -> RenderableType:
    """Return one picture of the run.

    Raises:
        UserError: as `watch`.
    """
    progress = read_progress(run_dir)
    experts = _served_loads(run_dir) or _ledger_loads(run_dir)
    parts: list[RenderableType] = [
        _headline(run_dir, progress),
        ProgressBar(total=progress.steps, completed=progress.step),
    ]
    if progress.line is not None:
        parts += [Text(), _losses(read_steps(run_dir)[-_TREND_LINES:])]
    if experts is not None:
        parts += [Text(f"\nload of each expert over its layer's mean ({experts.source})"), _heat_map(experts)]
    return Group(*parts)


def _headline(run_dir: Path, progress: RunProgress) -> Text:
    facts = [f"step {progress.step}/{progress.steps}"]
    if progress.line is not None and progress.images_per_second is not None:
        facts += [
            "done" if progress.is_done else f"{describe_seconds(progress.seconds_left)} left",
            f"{progress.images_per_second:.1f} images/s",
            f"loss {progress.line.loss:.4f}",
            f"learning rate {progress.line.learning_rate:.2e}",
            f"last line {describe_seconds(progress.line_age_seconds)} ago",
        ]
    if progress.checkpoint_step is not None:
        age = describe_seconds(progress.checkpoint_age_seconds)
        facts.append(f"checkpoint of step {progress.checkpoint_step} {age} ago")
    if progress.line is not None and progress.line.bad_steps:
        facts.append(f"{progress.line.bad_steps} steps without a finite gradient")
    return Text.assemble((str(run_dir), "bold"), "  ", ", ".join(facts))


def _losses(lines: Sequence[StepRecord]) -> Table:
    """The latest loss of each task, and what it was some lines ago."""
    table = Table("task", f"loss, step {lines[-1].step}", f"step {lines[0].step}", "change", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for task, loss in lines[-1].task_loss.items():
        before = lines[0].task_loss.get(task, float("nan"))
        change = loss / before - 1 if before else float("nan")
        style = "green" if change < 0 else "yellow"
        known = [f"{value:.4f}" if math.isfinite(value) else "-" for value in (loss, before)]
        table.add_row(task, *known, Text(f"{change:+.1%}" if math.isfinite(change) else "-", style))
    return table


def _heat_map(experts: _ExpertLoads) -> Table:
    """One row per layer, one cell per expert."""
    table = Table("layer", "experts", "most", "dead", box=None, pad_edge=False)
    for (block, kind), loads in sorted(experts.loads.items()):
        cells = Text.assemble(*(("  ", Style(bgcolor=_heat(load))) for load in loads))
        table.add_row(f"{block} {kind}", cells, f"{max(loads):.1f}", str(sum(load == 0 for load in loads)))
    return table


def _heat(load: float) -> Color:
    """Black for a dead expert, blue to white up to the even load, then towards red."""
    if load == 0:
        return Color.from_rgb(0, 0, 0)
    if load <= 1:
        return Color.from_rgb(40 + 200 * load, 60 + 180 * load, 160 + 80 * load)
    excess = min(1.0, (load - 1) / (_HOTTEST - 1))
    return Color.from_rgb(240, 240 - 200 * excess, 240 - 200 * excess)


def _served_loads(run_dir: Path) -> _ExpertLoads | None:
    """What rank 0 says of the steps since the line before; None if it does not answer or has no line yet."""
    try:
        (group,) = json.loads((run_dir / TARGETS / "rank_00000.json").read_text(encoding="utf-8"))
        loads = _ask_for_loads(group["targets"][0], group["labels"])
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        return None  # A killed run has left its announcement, and another program may listen there by now.
    return _ExpertLoads("since the line before", loads) if loads else None


def _ask_for_loads(address: str, labels: Mapping[str, str]) -> Loads:
    """Return what is served at an announced address; nothing where that is another machine's own, or another run."""
    if labels["node"] != socket.gethostname() and _is_loopback(urlsplit(f"//{address}").hostname or ""):
        return {}
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=_ANSWER_SECONDS) as answer:
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    if any(sample.labels["name"] != labels["run"] for sample in families["modsquad_run_info"].samples):
        return {}
    loads: dict[tuple[int, str], dict[int, float]] = {}
    for sample in families["modsquad_expert_load_ratio"].samples:
        layer = loads.setdefault((int(sample.labels["layer"]), sample.labels["kind"]), {})
        layer[int(sample.labels["expert"])] = sample.value
    return {layer: [by_expert[expert] for expert in sorted(by_expert)] for layer, by_expert in loads.items()}


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ledger_loads(run_dir: Path) -> _ExpertLoads | None:
    found = read_latest_ledger(run_dir)
    if found is None:
        return None
    step, ledger = found
    loads = {}
    for layer in ledger.layers:
        counts = ledger.counts[layer.name].sum(0).double()
        if counts.any():
            loads[layer.block, str(layer.kind)] = (counts / counts.mean()).tolist()
    return _ExpertLoads(f"evaluation of step {step}", loads) if loads else None
