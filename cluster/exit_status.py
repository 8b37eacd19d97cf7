"""How a rank's process ends, and what launchers read from it."""

import os
import signal
import sys
from typing import NoReturn

LOST_STATUS = 75
"""Of a rank that has lost another (EX_TEMPFAIL: worth another try)."""
WARNINGS = (signal.SIGTERM, signal.SIGUSR2)
"""By which schedulers announce the end of a job."""
# Killed: by a node that failed, or for memory that a neighbour took. Aborted: by NCCL's watchdog, which ends a process
# whose collectives hang, be it because another is lost.
RETRIED = (LOST_STATUS, *(128 + number for number in (*WARNINGS, signal.SIGKILL, signal.SIGABRT)))
"""Statuses of ranks that are worth another try."""


def end_at_once(status: int) -> NoReturn:
    """End this process without the end of Python, in which libraries may wait for others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
