"""Sections of the report on training: predictions, scores, curves, and the facts that a reader needs to repeat it."""

import math
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from configs.errors import UserError
from configs.load import dump_config
from configs.schema import RunConfig
from trainer.charts.figure import Floats
from trainer.charts.gallery import draw_room, predict_rooms
from trainer.charts.training import Progress, progress_chart, task_loss_chart
from trainer.checkpoint.files import Manifest, read_manifest
from trainer.report import page as html
from trainer.run_files import EvaluationRecord, StepRecord, TaskScore
from trainer.squads.export import load_run_model
from trainer.throughput import throughput

_PACKAGES = ("modsquad", "torch", "deepspeed", "fairscale", "webdataset", "numpy")


def predictions_section(folder: Path, run_dir: Path, config: RunConfig, rooms: int) -> html.Section:
    """Draw held-out images beside the truth; needs a checkpoint and the validation shards."""
    title = "Predictions on held-out images"
    try:
        model, _, step = load_run_model(run_dir)
        drawn = predict_rooms(model, config, rooms)
    except UserError as error:
        note = html.missing(f"no predictions ({error})", "They need a checkpoint and the validation shards.")
        return html.Section(title=title, body=note)
    body = ""
    for number, room in enumerate(drawn):
        path = folder / f"predictions_{number}.png"
        draw_room(path, room)
        body += html.picture(path, f"Image {room.key}: truth above, prediction below, for every task")
    caption = f"First images of {config.data.val}, which the model never trained on; checkpoint of step {step:,}."
    return html.Section(title=title, caption=caption, body=body)


def results_section(run_dir: Path, evaluation: EvaluationRecord | None) -> html.Section:
    """Tabulate every task's metric beside the best constant predictor."""
    title = "Every task against a constant"
    if evaluation is None:
        body = html.missing("no evaluation", f"`modsquad evaluate {run_dir}` makes one.")
        return html.Section(title=title, body=body)
    headers = ["task", "metric", "", "model", "best constant", "gain", "verdict"]
    rows = [_score_row(name, score) for name, score in evaluation.tasks.items()]
    caption = (
        f"{evaluation.images:,} {evaluation.split} images at step {evaluation.step:,}. The constant is the one "
        "prediction that scores best on a sample of labels from all over the training shards; a model that has learned "
        "nothing hardly beats it."
    )
    return html.Section(title=title, caption=caption, body=html.table(headers, rows, right=headers[3:6]))


def _score_row(name: str, score: TaskScore) -> list[html.Cell]:
    direction = "higher is better" if score.higher_is_better else "lower is better"
    difference = score.value - score.constant if score.higher_is_better else score.constant - score.value
    gain = difference / abs(score.constant) if score.constant else math.nan
    verdict = html.verdict(score.beats_constant, "better", "not better")
    return [name, score.metric, direction, score.value, score.constant, html.percent(gain, signed=True), verdict]


def curves_section(folder: Path, steps: list[StepRecord]) -> html.Section:
    """Draw what was logged during training."""
    title = "Training"
    if not steps:
        return html.Section(title=title, body=html.missing("no logged steps", "metrics.jsonl is empty."))
    numbers = np.array([record.step for record in steps], dtype=np.float64)

    def series(values: Iterable[float]) -> Floats:
        return np.array(list(values), dtype=np.float64)

    layers, tasks = steps[-1].mutual_information, steps[-1].task_loss
    progress = Progress(
        steps=numbers,
        loss=series(record.loss for record in steps),
        mutual_information={
            layer: series(record.mutual_information.get(layer, math.nan) for record in steps) for layer in layers
        },
        learning_rate=series(record.learning_rate for record in steps),
        images_per_second=series(throughput(steps)),
    )
    progress_chart(folder / "progress.png", progress)
    losses = {task: series(record.task_loss.get(task, math.nan) for record in steps) for task in tasks}
    task_loss_chart(folder / "task_losses.png", numbers, losses)
    shown = ["Total loss", *(["mutual information per layer"] if layers else []), "learning rate", "throughput"]
    body = html.chart(folder / "progress.png", ", ".join(shown))
    body += html.chart(folder / "task_losses.png", "Loss of every task over the steps")
    skipped = steps[-1].bad_steps
    caption = "Faint: as logged; strong: smoothed."
    if layers:
        caption += " Mutual information rises as tasks settle on their experts."
    if skipped:
        caption += f" {skipped:,} steps were skipped for a gradient that was not finite."
    return html.Section(title=title, caption=caption, body=body)


def facts_section(run_dir: Path, config: RunConfig, steps: list[StepRecord]) -> html.Section:
    """Tabulate what a reader needs to repeat the run."""
    manifest = latest_manifest(run_dir)
    train = config.train
    rows: list[list[html.Cell]] = [
        ["run folder", str(run_dir.resolve())],
        ["training shards", config.data.train],
        ["image side", f"{config.data.image_size} px"],
        ["images per step", f"{train.images_per_step:,}"],
        ["seed", str(config.seed)],
        ["precision", train.dtype],
        ["ranks", f"{manifest.world} (latest checkpoint)" if manifest else "unknown: no checkpoint"],
        ["ranks that share an expert layer", str(manifest.ep_size if manifest else config.parallel.ep_size)],
        ["ZeRO stage", str(config.parallel.zero_stage)],
        ["versions", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)],
        ["python", f"{platform.python_version()} on {platform.platform(terse=True)}"],
    ]
    if steps:
        seconds = float(np.median([record.step_seconds for record in steps]))
        rows.insert(4, ["median step", f"{html.number(seconds)} s"])
    body = html.table(["fact", "value"], rows) + html.details("Resolved configuration", dump_config(config))
    return html.Section(title="Facts", caption="Versions are those that wrote this report.", body=body)


def latest_manifest(run_dir: Path) -> Manifest | None:
    """Return what the latest checkpoint says of itself; None without one.

    Raises:
        UserError: it cannot be read.
    """
    folder = max((run_dir / "checkpoints").glob("step_*"), default=None)
    manifest = read_manifest(folder) if folder else None
    return manifest if isinstance(manifest, Manifest) else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
