"""The part `trackers` of a configuration: what a run logs, for TensorBoard, spreadsheets, and Weights & Biases.

DeepSpeed's monitor writes, on rank 0 alone; metrics.jsonl and evaluation/ stay the record. At every start of a run the
files in RUN/trackers/ are written anew from that record, so that they hold each step once, however often the run was
killed, and all of it when a tracker is switched on in the middle. Weights & Biases is only sent what is new: each
start is a run of its own there, in the group named after the run folder.
"""

import importlib
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.env import RankEnv
from configs.atomic import cannot_write
from configs.errors import UserError
from configs.schema import RunConfig
from configs.watching import TrackersConfig
from trainer.engine import Event, open_monitor
from trainer.journal import METRICS_FILE, finite
from trainer.run_files import StepRecord, parse_json, read_steps, read_text
from trainer.throughput import throughput

TRACKERS = "trackers"


class Trackers:
    """Copies lines of metrics.jsonl and evaluations; does nothing on ranks other than 0, or with all switched off."""

    def __init__(self, run_dir: Path, config: RunConfig, env: RankEnv, step: int) -> None:
        """Write what the run folder holds, and get ready for more; after `init_distributed`.

        Args:
            run_dir: the run folder; its metrics.jsonl ends at `step`.
            config: reads `trackers`.
            env: this rank.
            step: finished steps.

        Raises:
            UserError: a library is missing, a file cannot be written or read, or Weights & Biases does not start.
        """
        trackers = config.trackers
        _check_libraries(trackers)
        self._folder = run_dir / TRACKERS
        self._before: list[StepRecord] = []  # the latest line
        self._writers: list[Callable[[list[Event]], None]] = []
        self._evaluated: set[int] = set()
        self._sends = env.is_main and trackers.wandb_project is not None
        if not env.is_main:
            return
        if trackers.tensorboard or trackers.csv:
            self._writers.append(self._open_files(trackers))
            self._write(self._record(run_dir, step))
        elif self._sends:
            self._before = read_steps(run_dir)[-1:]
        if self._sends:
            self._writers.append(self._open_wandb(trackers, run_dir.resolve().name))

    def on_line(self, line: Mapping[str, Any]) -> None:
        """Copy a line of metrics.jsonl.

        Raises:
            UserError: it cannot be written.
        """
        self._write(self._line_events(line, METRICS_FILE))

    def on_evaluation(self, values: Mapping[str, Any]) -> None:
        """Copy the content of an evaluation file, unless that of its step was copied before.

        Raises:
            UserError: it cannot be written.
        """
        if values["step"] not in self._evaluated:
            self._evaluated.add(values["step"])
            self._write(evaluation_events(values))

    def close(self) -> None:
        """Let Weights & Biases send the rest."""
        if self._sends:
            self._sends = False
            importlib.import_module("wandb").finish()

    def _write(self, events: list[Event]) -> None:
        try:
            for write in self._writers:
                write(events)
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def _record(self, run_dir: Path, step: int) -> list[Event]:
        """Return the events of everything that the run folder holds up to `step`."""
        events: list[Event] = []
        path = run_dir / METRICS_FILE
        for number, line in enumerate(read_text(path).splitlines() if path.is_file() else (), start=1):
            where = f"{path}, line {number}"
            events += self._line_events(parse_json(line, where), where)
        for path in sorted((run_dir / "evaluation").glob("step_*_val.json")):
            values = parse_json(read_text(path), str(path))
            if values["step"] <= step:
                self._evaluated.add(values["step"])
                events += evaluation_events(values)
        return events

    def _line_events(self, line: Mapping[str, Any], where: str) -> list[Event]:
        """Return the events of the line that follows the latest one."""
        record = StepRecord.from_values(line, where)
        rate = throughput([*self._before, record])[-1]
        self._before = [record]
        return line_events(line, finite(rate))

    def _open_files(self, trackers: TrackersConfig) -> Callable[[list[Event]], None]:
        """Begin new files in folders of their own."""
        settings = {
            section: {"enabled": enabled, "output_path": str(self._folder), "job_name": name}
            for section, name, enabled in (
                ("tensorboard", "tensorboard", trackers.tensorboard),
                ("csv_monitor", "csv", trackers.csv),
            )
        }
        try:
            for given in settings.values():
                if given["enabled"]:
                    with suppress(FileNotFoundError):
                        shutil.rmtree(self._folder / str(given["job_name"]))
            return open_monitor(settings)
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def _open_wandb(self, trackers: TrackersConfig, group: str) -> Callable[[list[Event]], None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_DIR", str(self._folder))
        settings = {"enabled": True, "project": trackers.wandb_project, "team": trackers.wandb_team, "group": group}
        try:
            return open_monitor({"wandb": settings})
        except Exception as error:  # of many kinds: no key, no network, no such team
            reason = " ".join(str(error).split())
            raise UserError(
                f"Weights & Biases does not start: {reason}; see `wandb login`, or set trackers.wandb_project=null"
            ) from error


def line_events(line: Mapping[str, Any], images_per_second: float | None) -> list[Event]:
    """Return the numbers of a line of metrics.jsonl as (name, value, step); those that are null are left out."""
    values = {
        **{f"train/{key}": line[key] for key in ("loss", "matching_loss", "learning_rate", "gradient_norm")},
        "train/images_per_second": images_per_second,
        **{f"task_loss/{task}": value for task, value in line["task_loss"].items()},
        **{f"mutual_information/{layer}": value for layer, value in line["mutual_information"].items()},
    }
    return [(name, value, line["step"]) for name, value in values.items() if value is not None]


def evaluation_events(values: Mapping[str, Any]) -> list[Event]:
    """Return the scores in the content of an evaluation file as (name, value, step), every metric of every task."""
    return [
        (f"{values['split']}/{task}/{metric}", score["value"], values["step"])
        for task, scores in values["tasks"].items()
        for metric, score in scores["all"].items()
        if score["value"] is not None
    ]


def _check_libraries(trackers: TrackersConfig) -> None:
    """Raise on every rank alike when what the configuration asks for is not installed."""
    wanted = {"tensorboard": trackers.tensorboard, "wandb": trackers.wandb_project is not None}
    keys = {"tensorboard": "trackers.tensorboard", "wandb": "trackers.wandb_project"}
    for library, enabled in wanted.items():
        spec = find_spec(library) if enabled else None
        if enabled and (spec is None or spec.origin is None):  # without origin: a folder that happens to have the name
            raise UserError(
                f"{keys[library]}: {library} is not installed; `pip install 'modsquad[{library}]'` does it, or leave "
                "the key out"
            )
