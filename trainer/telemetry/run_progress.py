"""How far a run is, from its folder alone: for `modsquad status` and `modsquad watch`."""

import time
from dataclasses import dataclass
from pathlib import Path

from trainer.run_files import StepRecord, read_config, read_steps
from trainer.throughput import throughput


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """The place of a run.

    Attributes:
        step, steps: finished steps as of the last line of metrics.jsonl, and all of them.
        line: that line; None before the first.
        images_per_second: of all ranks; None before the first line.
        seconds_left: at the speed of that line; None before the first.
        line_age_seconds: since that line was written; None before the first.
        checkpoint_step: the latest checkpoint; None without one.
        checkpoint_age_seconds: since it was written; None without one.
        tasks: the run's tasks.
    """

    step: int
    steps: int
    line: StepRecord | None
    images_per_second: float | None
    seconds_left: float | None
    line_age_seconds: float | None
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    tasks: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        """Whether all steps are finished."""
        return self.step >= self.steps


def read_progress(run_dir: Path) -> RunProgress:
    """Return the progress of a run.

    Raises:
        UserError: the folder is no run, or a file of it does not parse.
    """
    config = read_config(run_dir)
    steps = read_steps(run_dir)
    line = steps[-1] if steps else None
    now = time.time()
    checkpoint = max((run_dir / "checkpoints").glob("step_*"), default=None)
    done = line.step if line else 0
    seconds = line.step_seconds if line and line.step_seconds > 0 else None
    return RunProgress(
        step=done,
        steps=config.train.steps,
        line=line,
        images_per_second=throughput(steps)[-1] if seconds else None,
        seconds_left=seconds * (config.train.steps - done) if seconds else None,
        line_age_seconds=now - (run_dir / "metrics.jsonl").stat().st_mtime if line else None,
        checkpoint_step=int(checkpoint.name.removeprefix("step_")) if checkpoint else None,
        checkpoint_age_seconds=now - checkpoint.stat().st_mtime if checkpoint else None,
        tasks=tuple(spec.name for spec in config.task_specs),
    )


def describe_seconds(seconds: float | None) -> str:
    """Return a span of time as people say it: "42 s", "7 min", "3 h 20 min", "2 d 4 h"; "-" for none."""
    if seconds is None:
        return "-"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 36:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
