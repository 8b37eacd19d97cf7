"""Runs trials of `modsquad tune`: one after the other as processes of this machine, or side by side as a SLURM array.

A trial that fails says why in one line; it never ends the search.
"""

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.jobs import job_state
from cluster.launch import JOB_FILE, SLURM_FOLDER, JobRecord, Run, read_job, submit
from cluster.local import run_ranks
from configs.launch import LaunchConfig
from trainer.tune.trial import TRIAL_FILE

TRIAL_COMMAND = (sys.executable, "-m", "trainer.cli", "tune-trial")
TRIAL_ENTRY = "trainer.tune.trial:trial_rank"
_SHARED_FILES_SECONDS = 5.0  # a network file system shows another node's file with a delay


class Stopped(Exception):
    """A signal ended the search.

    Attributes:
        exit_status: 128 + signal.
    """

    def __init__(self, exit_status: int) -> None:
        super().__init__(exit_status)
        self.exit_status = exit_status


@dataclass(frozen=True)
class Trial:
    """A trial that is ready to run.

    Attributes:
        folder: its run folder.
        config: text of its configuration.
    """

    folder: Path
    config: str


@dataclass(frozen=True, kw_only=True)
class LocalRunner:
    """Runs one trial at a time on `ranks` processes of this machine.

    Attributes:
        ranks: processes.
        command: program and arguments; the path of the trial's configuration follows.
    """

    ranks: int
    command: Sequence[str] = TRIAL_COMMAND
    at_once: int = field(default=1, init=False)

    def __call__(self, trials: Sequence[Trial], finished: Callable[[int, str | None], None]) -> None:
        """Run the trials; call `finished(place, reason)` for each, with None where it succeeded.

        Raises:
            Stopped: SIGINT, SIGTERM or SIGUSR2; the trial under way has no result.
        """
        for place, trial in enumerate(trials):
            if (trial.folder / TRIAL_FILE).is_file():  # the search was ended before it took note
                finished(place, None)
                continue
            config = trial.folder / "trial.yaml"
            config.write_text(trial.config, encoding="utf-8")
            heard: list[str] = []
            logs = trial.folder / "logs"
            status = run_ranks([*self.command, str(config)], self.ranks, logs, report=heard.append)
            if status and not heard:
                raise Stopped(status)
            # What a killed rank leaves the others to say is that they lost it.
            reason = _without_path(heard[0]) if heard else ""
            told = None if "was ended by" in reason else failure_in(sorted(logs.glob("rank_*.log")))
            finished(place, (told or reason) if status else None)


@dataclass(frozen=True, kw_only=True)
class SlurmRunner:
    """Runs trials as one SLURM array and waits for it.

    Attributes:
        launch: what to ask for, for each trial.
        folder: receives scripts, logs and the copy of the code.
        at_once: trials of one array.
        poll_seconds: between two looks.
    """

    launch: LaunchConfig
    folder: Path
    at_once: int
    poll_seconds: float = 5.0

    def __call__(self, trials: Sequence[Trial], finished: Callable[[int, str | None], None]) -> None:
        """Run the trials; call `finished(place, reason)` for each as it ends, with None where it succeeded.

        A trial that was submitted before, by a search that was ended, is only waited for.

        Raises:
            UserError: sbatch refuses, or SLURM does not answer.
        """
        new = [trial for trial in trials if not (trial.folder / SLURM_FOLDER / JOB_FILE).is_file()]
        if new:
            # A trial that is killed for its memory would be killed again.
            launch = self.launch.model_copy(update={"max_requeues": 0})
            submit([Run(trial.folder, trial.config, TRIAL_ENTRY) for trial in new], launch, self.folder)
        waiting = {place: (trial, read_job(trial.folder)) for place, trial in enumerate(trials)}
        while waiting:
            for place, (trial, job) in list(waiting.items()):
                if (trial.folder / TRIAL_FILE).is_file():
                    finished(place, None)
                elif (state := job_state(job.job_id)).is_over:
                    finished(place, self._reason(trial, job, state.state))
                else:
                    continue
                del waiting[place]
            if waiting:
                time.sleep(self.poll_seconds)

    def _reason(self, trial: Trial, job: JobRecord, state: str) -> str | None:
        deadline = time.monotonic() + (_SHARED_FILES_SECONDS if state == "COMPLETED" else 0.0)
        while not (trial.folder / TRIAL_FILE).is_file():
            if time.monotonic() >= deadline:
                logs = [job.log(rank, stream) for rank in range(job.ranks) for stream in ("err", "out")]
                return f"job {job.job_id} {state.lower()}: {failure_in(logs) or 'its log says nothing'}"
            time.sleep(0.2)
        return None


def failure_in(logs: Iterable[Path]) -> str | None:
    """Return the line that says most about a failure: an error of ours, else one of memory, else the last line."""
    lines = [line.strip() for log in logs if log.is_file() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    for pattern in (
        r"^error: (?!rank \d+ lost)",
        r"OutOfMemoryError|out of memory|oom.kill",
        r"^\w*(Error|Exception)\b",
    ):
        for line in lines:
            if re.search(pattern, line, re.IGNORECASE):
                return line.removeprefix("error: ")
    return lines[-1] if lines else None


def _without_path(reason: str) -> str:
    return re.sub(r" \(all of it: .*\)$", "", reason)
