"""`modsquad report`: RUN/report/index.html and its pictures, made from what the run folder holds.

Nothing is measured anew but the predictions on a few held-out images. A part whose source is absent is named as
missing on the page, with the command that makes it.
"""

import math
import platform
import shutil
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from configs.atomic import atomic_path
from configs.errors import UserError
from configs.load import dump_config
from configs.schema import RunConfig
from trainer import report_page as html
from trainer.charts import ExpertMap, Floats, Progress, expert_map_chart, progress_chart, task_loss_chart
from trainer.checkpoint_files import Manifest, read_manifest
from trainer.export import load_run_model
from trainer.extraction import read_summary
from trainer.gallery import draw_room, predict_rooms
from trainer.run_files import (
    EvaluationRecord,
    StepRecord,
    TaskScore,
    read_config,
    read_latest_evaluation,
    read_latest_ledger,
    read_steps,
)
from trainer.squad_summary import SquadSummary

_PACKAGES = ("modsquad", "torch", "deepspeed", "fairscale", "webdataset", "numpy")


def write_report(run_dir: Path, *, rooms: int = 4) -> Path:
    """Write the report of a run and return the page's path.

    The page carries its pictures inside; the same PNGs lie beside it. A report that stood there before is replaced
    only when the new one is whole, the page last.

    Args:
        run_dir: folder of the run, finished or not.
        rooms: held-out images to show.

    Raises:
        UserError: the folder is no run, one of its files is damaged, or it cannot be written.
    """
    config = read_config(run_dir)
    steps = read_steps(run_dir)
    evaluation = read_latest_evaluation(run_dir)
    with tempfile.TemporaryDirectory(prefix="modsquad-report-") as scratch:
        folder = Path(scratch)
        sections = [
            _predictions(folder, run_dir, config, rooms),
            _results(run_dir, evaluation),
            _curves(folder, config, steps),
            _experts(folder, run_dir),
            _squads(run_dir),
            _facts(run_dir, config, steps),
        ]
        subtitle = f"{len(config.task_specs)} tasks from one modular vision transformer"
        text = html.page(run_dir.resolve().name, subtitle, _headline(config, steps, evaluation), sections)
        (folder / "index.html").write_text(text, encoding="utf-8")
        return _publish(folder, run_dir / "report")


def _headline(config: RunConfig, steps: list[StepRecord], evaluation: EvaluationRecord | None) -> list[tuple[str, str]]:
    """Return the (label, value) pairs at the top of the page."""
    tiles = [("tasks", str(len(config.task_specs)))]
    if steps:
        done = steps[-1].step
        tiles += [
            ("steps", f"{done:,} of {config.train.steps:,}"),
            ("images seen", f"{done * config.train.images_per_step:,}"),
            ("loss", html.number(steps[-1].loss)),
        ]
    if evaluation:
        better = sum(score.beats_constant is True for score in evaluation.tasks.values())
        tiles.append(("better than a constant", f"{better} of {len(evaluation.tasks)} tasks"))
    return tiles


def _predictions(folder: Path, run_dir: Path, config: RunConfig, rooms: int) -> html.Section:
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


def _results(run_dir: Path, evaluation: EvaluationRecord | None) -> html.Section:
    """Tabulate every task's metric beside the best constant predictor."""
    title = "Every task against a constant"
    if evaluation is None:
        body = html.missing("no evaluation", f"`modsquad evaluate {run_dir}` makes one.")
        return html.Section(title=title, body=body)
    headers = ["task", "metric", "", "model", "best constant", "gain", "verdict"]
    rows = [_score_row(name, score) for name, score in evaluation.tasks.items()]
    caption = (
        f"{evaluation.images:,} {evaluation.split} images at step {evaluation.step:,}. The constant is the one "
        "prediction that scores best on the training labels; a model that has learned nothing cannot beat it."
    )
    return html.Section(title=title, caption=caption, body=html.table(headers, rows, right=headers[3:6]))


def _score_row(name: str, score: TaskScore) -> list[html.Cell]:
    direction = "higher is better" if score.higher_is_better else "lower is better"
    difference = score.value - score.constant if score.higher_is_better else score.constant - score.value
    gain = difference / abs(score.constant) if score.constant else math.nan
    verdict = html.verdict(score.beats_constant, "better", "not better")
    return [name, score.metric, direction, score.value, score.constant, html.percent(gain, signed=True), verdict]


def _curves(folder: Path, config: RunConfig, steps: list[StepRecord]) -> html.Section:
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
        images_per_second=series(config.train.images_per_step / record.step_seconds for record in steps),
    )
    progress_chart(folder / "progress.png", progress)
    losses = {task: series(record.task_loss.get(task, math.nan) for record in steps) for task in tasks}
    task_loss_chart(folder / "task_losses.png", numbers, losses)
    body = html.picture(folder / "progress.png", "Total loss, mutual information per layer, learning rate, throughput")
    body += html.picture(folder / "task_losses.png", "Loss of every task over the steps")
    skipped = steps[-1].bad_steps
    caption = "Faint: as logged; strong: smoothed. Mutual information rises as tasks settle on their experts."
    if skipped:
        caption += f" {skipped:,} steps were skipped for a gradient that was not finite."
    return html.Section(title=title, caption=caption, body=body)


def _experts(folder: Path, run_dir: Path) -> html.Section:
    """Draw who uses whom, per expert layer that sees the task."""
    title = "Which task uses which experts"
    found = read_latest_ledger(run_dir)
    if found is None:
        body = html.missing("no routing ledger", f"`modsquad evaluate {run_dir}` makes one.")
        return html.Section(title=title, body=body)
    step, ledger = found
    maps = [
        ExpertMap(
            layer=layer.name,
            share_TE=(ledger.counts[layer.name] / ledger.tokens[layer.name][:, None]).double().numpy(),
            mutual_information=ledger.mutual_information(layer.name),
        )
        for layer in ledger.layers
        if layer.sees_task
    ]
    if not maps:
        body = html.missing("no expert layer sees the task", "All expert layers lie in the shared blocks.")
        return html.Section(title=title, body=body)
    expert_map_chart(folder / "experts.png", ledger.tasks, maps)
    caption = (
        f"Share of each task's tokens that chose each expert, on the validation images of step {step:,}. Tasks stand "
        "in one order everywhere, similar users side by side; experts are ordered per layer so that squads show as "
        "blocks. I is the mutual information of tasks and experts in nats."
    )
    return html.Section(title=title, caption=caption, body=html.picture(folder / "experts.png", title))


def _squads(run_dir: Path) -> html.Section:
    """Tabulate the extracted squads."""
    title = "Extracted squads"
    folders = sorted((run_dir / "squads").glob("*/"))
    squads = [squad for folder in folders if (squad := read_summary(folder)) is not None]
    if not squads:
        body = html.missing("no squad in squads/", f"`modsquad extract {run_dir} --task TASK` makes one.")
        return html.Section(title=title, body=body)
    headers = ["task", "experts kept", "parameters", "MACs per image", "metric", "before", "after", "change"]
    headers += ["unaffected tokens", "step"]
    caption = (
        "A squad is one task as a standalone model, measured beside the whole one on the same images; one bar per "
        "expert layer. Unaffected tokens are those whose chosen experts all stay, in every layer. MACs stay as they "
        "are: every token still uses as many experts."
    )
    body = html.table(headers, [_squad_row(squad) for squad in squads], right=headers[5:])
    return html.Section(title=title, caption=caption, body=body)


def _squad_row(squad: SquadSummary) -> list[html.Cell]:
    return [
        squad.task,
        html.bars([(layer.name, len(layer.kept), layer.num_experts) for layer in squad.layers]),
        f"{html.quantity(squad.parameters_before)} → {html.quantity(squad.parameters_after)}",
        f"{html.quantity(squad.macs_before)} → {html.quantity(squad.macs_after)}",
        squad.metric,
        squad.value_before,
        squad.value_after,
        html.percent(squad.relative_change, signed=True),
        html.percent(squad.unaffected_tokens),
        squad.step,
    ]


def _facts(run_dir: Path, config: RunConfig, steps: list[StepRecord]) -> html.Section:
    """Tabulate what a reader needs to repeat the run."""
    manifest = _latest_manifest(run_dir)
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


def _latest_manifest(run_dir: Path) -> Manifest | None:
    folder = max((run_dir / "checkpoints").glob("step_*"), default=None)
    manifest = read_manifest(folder) if folder else None
    return manifest if isinstance(manifest, Manifest) else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _publish(source: Path, target: Path) -> Path:
    """Move the new files to `target` one by one, the page last, and remove pictures of an older report."""
    pictures = sorted(source.glob("*.png"))
    for path in [*pictures, source / "index.html"]:
        with atomic_path(target / path.name) as temporary:
            shutil.copyfile(path, temporary)
    for old in set(target.glob("*.png")) - {target / path.name for path in pictures}:
        old.unlink()
    return target / "index.html"
