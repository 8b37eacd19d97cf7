"""What a submitted job runs on every rank: the trainer, through submitit.

submitit's own answer to a warning runs inside a signal handler, on rank 0 alone, in the middle of a step, where ranks
cannot agree on anything. So the trainer catches the signals itself: all ranks save at one step boundary and leave with
a status that tells the batch script to put the job back into the queue. Such a rank leaves no result behind, which
would be taken for that of a later run of the same job; nor does one that fails, as its log has said why.
"""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cluster.cpu import tune_process
from cluster.env import RankEnv, detect
from cluster.exit_status import RETRIED, WARNINGS, end_at_once

TRAIN_ENTRY = "trainer.entry:train_rank"
FAILED_FILE_VARIABLE = "MODSQUAD_FAILED_FILE"
"""Names the file by which a rank tells the batch script that another try would fail too."""


@dataclass(frozen=True)
class TrainJob:
    """One training run; submitit pickles it, and every rank calls it.

    Attributes:
        config: path of the resolved configuration.
        entry: "module:function" of the trainer, which this package does not import; called with (config, env), it
            returns the exit status of its rank.
    """

    config: str
    entry: str = TRAIN_ENTRY

    def __call__(self) -> str:
        """Train; return the configuration's path when the run is complete, else leave with the rank's exit status."""
        for number in WARNINGS:
            signal.signal(number, _leave_at_once)
        tune_process()  # before torch is imported; the same as for `modsquad train`
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        module, _, name = self.entry.partition(":")
        train: Callable[[str, RankEnv], int] = getattr(import_module(module), name)
        try:
            status = train(self.config, detect())
        except Exception:
            _tell_failure(1)
            raise
        if status not in (0, *RETRIED):
            _tell_failure(status)
        if status:
            end_at_once(status)
        return self.config


def _tell_failure(status: int) -> None:
    """Leave a note: srun ends the other ranks by signals, and reports the largest status of all."""
    if path := os.environ.get(FAILED_FILE_VARIABLE):
        with suppress(OSError):
            Path(path).write_text(f"{status}\n", encoding="utf-8")


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Before training has begun there is nothing to save."""
    end_at_once(128 + number)
