"""One trial of `modsquad tune` on one rank: real steps of the run, timed; nothing is left but the figures.

The folder of the trial is the run folder of its configuration. It holds what is asked (`request.json`) and, when the
trial is over, what was measured (`trial.json`); no checkpoint, no evaluation.
"""

import json
import os
import platform
import time
from functools import partial
from operator import lt
from pathlib import Path

import torch

from cluster.env import RankEnv
from configs.atomic import write_text_atomically
from configs.load import load_config
from configs.schema import RunConfig
from trainer.distributed.agreement import on_all, on_main
from trainer.distributed.rank_process import load_on_all, run_to_the_end
from trainer.footprint.memory import peak_bytes
from trainer.loop import Trainer
from trainer.run_files import Number, Record, parse, read_text

REQUEST_FILE, TRIAL_FILE = "request.json", "trial.json"
_FEWEST_STEPS = 2  # measured before a trial may be called slow


class TrialRequest(Record):
    """What is asked of a trial.

    Attributes:
        steps: optimizer steps, the first `warmup_steps` of which are not measured.
        slowest_seconds: a trial whose every measured step takes longer is stopped; None: none is.
    """

    steps: int
    warmup_steps: int
    slowest_seconds: float | None = None


class TrialFigures(Record):
    """What a trial measured.

    Attributes:
        step_seconds: of every measured step, on the slowest rank.
        data_wait_seconds: of a step, mean over steps and ranks.
        peak_bytes: of every rank: what torch reserved on the GPU, or what the process held.
        stopped: before its last step, since it was slow.
        loss: mean over the measured steps.
        device: what a rank ran on.
    """

    step_seconds: tuple[float, ...]
    data_wait_seconds: Number
    peak_bytes: tuple[int, ...]
    stopped: bool
    loss: Number
    device: str


def trial_rank(config: str, env: RankEnv, *, debug: bool = False) -> int:
    """Run a trial on this rank and return the exit status; arguments as in `trainer.entry.train_rank`."""

    def action() -> None:
        run = load_on_all(lambda: load_config(config), env)
        request = read_request(Path(run.run_dir))
        measure(run, request, env)

    return run_to_the_end(action, env, debug=debug)


def measure(config: RunConfig, request: TrialRequest, env: RankEnv) -> TrialFigures:
    """Take the steps and write the figures; every rank of the world calls this together.

    Raises:
        UserError: the configuration does not fit the world or the shards, or the figures cannot be written.
    """
    trainer = Trainer(config, env)
    group, warmup = trainer.parts.engine.world_group, request.warmup_steps
    seconds: list[float] = []
    stopped = False
    try:
        while len(seconds) < request.steps and not stopped:
            if len(seconds) == warmup:
                trainer.state.gather(group, env.rank)
                trainer.state.journal.next_line()
            started = time.perf_counter()
            trainer.step()
            seconds.append(time.perf_counter() - started)
            if request.slowest_seconds is not None and len(seconds) >= warmup + _FEWEST_STEPS:
                stopped = on_main(group, partial(lt, request.slowest_seconds, min(seconds[warmup:])))
        total, _ = trainer.state.gather(group, env.rank)
        line = trainer.state.journal.line(total)
        of_ranks = on_all(group, lambda: (seconds[warmup:], peak_bytes()))
        figures = TrialFigures(
            step_seconds=tuple(map(max, zip(*(times for times, _ in of_ranks), strict=True))),
            data_wait_seconds=line["data_wait_seconds"],
            peak_bytes=tuple(peak for _, peak in of_ranks),
            stopped=stopped and len(seconds) < request.steps,
            loss=line["loss"],
            device=_device(),
        )
        on_main(group, lambda: _write(Path(config.run_dir), TRIAL_FILE, figures))
    finally:
        trainer.close()
    return figures


def write_request(folder: Path, request: TrialRequest) -> None:
    """Say what is asked of the trial in `folder`."""
    _write(folder, REQUEST_FILE, request)


def read_request(folder: Path) -> TrialRequest:
    """Return what is asked of the trial in `folder`.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / REQUEST_FILE
    return parse(TrialRequest, read_text(path), str(path))


def read_figures(folder: Path) -> TrialFigures | None:
    """Return what the trial in `folder` measured, or None when it has not come to its end.

    Raises:
        UserError: the file does not parse.
    """
    path = folder / TRIAL_FILE
    return parse(TrialFigures, read_text(path), str(path)) if path.is_file() else None


def _write(folder: Path, name: str, record: Record) -> None:
    write_text_atomically(folder / name, json.dumps(record.model_dump(mode="json")) + "\n")


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    names = [line for line in _cpu_lines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return f"{threads} {'thread' if threads == 1 else 'threads'} of {name} ({os.cpu_count()} cores)"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
