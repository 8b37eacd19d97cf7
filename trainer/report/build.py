"""`modsquad report`: RUN/report/index.html and its pictures, made from what the run folder holds.

Nothing is measured anew but the predictions on a few held-out images. A part whose source is absent is named as
missing on the page, with the command that makes it.
"""

import shutil
import tempfile
from pathlib import Path

from configs.atomic import atomic_path
from configs.schema import RunConfig
from trainer.report import page as html
from trainer.report.experts import conflict_section, expert_sections
from trainer.report.squads import squads_section
from trainer.report.training import curves_section, facts_section, predictions_section, results_section
from trainer.run_files import (
    EvaluationRecord,
    StepRecord,
    read_config,
    read_latest_evaluation,
    read_latest_ledger,
    read_steps,
)


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
    ledger = read_latest_ledger(run_dir)
    with tempfile.TemporaryDirectory(prefix="modsquad-report-") as scratch:
        folder = Path(scratch)
        sections = [
            predictions_section(folder, run_dir, config, rooms),
            results_section(run_dir, evaluation),
            curves_section(folder, steps),
            *expert_sections(folder, run_dir, ledger),
            *([conflict_section(folder, run_dir, ledger)] if len(config.task_specs) > 1 else []),
            squads_section(run_dir),
            facts_section(run_dir, config, steps),
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
            ("images seen", f"{steps[-1].images:,}"),
            ("loss", html.number(steps[-1].loss)),
        ]
    if evaluation:
        better = sum(score.beats_constant is True for score in evaluation.tasks.values())
        tiles.append(("better than a constant", f"{better} of {len(evaluation.tasks)} tasks"))
    return tiles


def _publish(source: Path, target: Path) -> Path:
    """Move the new files to `target` one by one, the page last, and remove pictures of an older report."""
    pictures = sorted(source.glob("*.png"))
    for path in [*pictures, source / "index.html"]:
        with atomic_path(target / path.name) as temporary:
            shutil.copyfile(path, temporary)
    for old in set(target.glob("*.png")) - {target / path.name for path in pictures}:
        old.unlink()
    return target / "index.html"
