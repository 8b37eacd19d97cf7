"""Several ranks on this machine: start them, watch them, stop all when one fails, leave none behind.

Rank 0 shares the terminal; the other ranks write to files, of which a line is shown where they are the ones that fail
or have spoken for all.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cluster.cpu import usable_cores
from cluster.env import RankEnv, free_port, import_variables
from cluster.exit_status import LOST_STATUS
from configs.errors import UserError

PARENT_VARIABLE = "MODSQUAD_LAUNCHER_PID"
STOP_SECONDS = 60.0  # a rank that was asked to stop may first write a checkpoint
_CAUSE_SECONDS = 3.0  # between the error of one rank and the last exit of those that lost it
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_STOPPED = {status for number in _SIGNALS for status in (-number, 128 + number)}


def run_ranks(
    command: Sequence[str],
    ranks: int,
    log_folder: Path,
    variables: Mapping[str, str] | None = None,
    report: Callable[[str], object] | None = None,
) -> int:
    """Run `command` as `ranks` processes that find each other, and wait for them; in the main thread.

    The ranks share the cores that this process may use, unless the user has set OMP_NUM_THREADS. SIGINT, SIGTERM and
    SIGUSR2 are passed on to the ranks, which may first save; a second Ctrl-C kills them.

    Args:
        command: program and arguments, the same for every rank.
        ranks: number of processes.
        log_folder: receives `rank_N.log` of every rank but 0; created if missing.
        variables: further environment variables.
        report: hears why a rank failed, and rank 0 writes to a file like the others; None: the terminal is for both.

    Returns:
        0 when all ranks succeed, else the status of the rank that failed first; the others are then stopped. 128 +
        signal after a signal, unless a rank failed otherwise.

    Raises:
        UserError: `log_folder` cannot be written, or the program cannot be started.
    """
    logs = [log_folder / f"rank_{rank}.log" for rank in range(ranks)]
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    with _passing_on_signals(processes) as received:
        try:
            log_folder.mkdir(parents=True, exist_ok=True)
            for rank, log in enumerate(logs):
                if not received:
                    shown = rank == 0 and report is None
                    processes.append(_start(command, rank, ranks, port, None if shown else log, variables or {}))
            failed = _wait(processes)
        except OSError as error:
            raise UserError(f"cannot start the ranks: {error.filename}: {error.strerror}") from error
        finally:
            _stop(processes)
    code = 0 if failed is None else processes[failed].returncode
    spoken = None if report else _spoken_for_all(logs[1 : len(processes)])
    if received and (code == 0 or code in _STOPPED or received.count(signal.SIGINT) > 1):
        _tell(spoken, None)
        return 128 + received[0]
    if failed is not None:
        _tell(_reason(failed, code, logs[failed], has_log=failed > 0 or report is not None) or spoken, report)
    return 128 - code if code < 0 else code


def die_with_launcher() -> None:
    """Ask the kernel to kill this process when the launcher that started it is gone (Linux; else do nothing)."""
    launcher = os.environ.get(PARENT_VARIABLE)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _passing_on_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass SIGINT, SIGTERM and SIGUSR2 on to `processes`; yield the list of those that came.

    Ctrl-C reaches the ranks of a terminal without us, and would act at once if it came twice: so SIGTERM goes to them,
    which one that is stopping already only notes.
    """
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _signal_all(processes, signal.SIGKILL if received.count(signal.SIGINT) > 1 else signal.SIGTERM)

    previous = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(
    command: Sequence[str], rank: int, ranks: int, port: int, log: Path | None, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    env = RankEnv(rank=rank, world=ranks, local_rank=rank, master_port=port)
    environment = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // ranks)),
        **os.environ,
        **import_variables(),
        **variables,
        **env.variables(),
        PARENT_VARIABLE: str(os.getpid()),
    }
    if log is None:
        return subprocess.Popen(command, env=environment)
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all succeed (None) or one fails (its rank)."""
    while True:
        codes = [process.poll() for process in processes]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return _first_cause(processes, failed)
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _first_cause(processes: Sequence[subprocess.Popen[bytes]], failed: list[int]) -> int:
    """Choose the rank to report: a clear error or a kill from outside tells more than the loss of a peer."""
    deadline = time.monotonic() + _CAUSE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    causes = [code for code in (2, -signal.SIGKILL) if code in codes]
    causes += [code for code in codes if code not in (None, 0, LOST_STATUS)]
    return codes.index(causes[0]) if causes else failed[0]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    _signal_all(processes, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _signal_all(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _spoken_for_all(logs: Sequence[Path]) -> str | None:
    """Return what a rank that writes to a file said for all: that of the ranks which comes first says it once."""
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line.startswith(("error: ", "interrupted by "))), None)


def _tell(reason: str | None, report: Callable[[str], object] | None) -> None:
    if report:
        report(reason or "")
    elif reason:
        print(reason, file=sys.stderr)


def _reason(rank: int, code: int, log: Path, *, has_log: bool) -> str | None:
    """Say why a rank failed; None where it has said so itself on the terminal."""
    where = f" (all of it: {log})" if has_log else ""
    if code < 0:
        reason = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"rank {rank} was ended by {signal.Signals(-code).name}{reason}{where}"
    if not has_log:
        return None
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"rank {rank}: {lines[-1] if lines else 'ended without a message'}{where}"
