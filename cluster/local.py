"""Several ranks on this machine: start them, watch them, stop all when one fails, leave none behind.

Rank 0 shares the terminal; the other ranks write to files, whose last line is shown when they are the ones that fail.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.cpu import usable_cores
from cluster.env import RankEnv, free_port
from configs.errors import UserError

PARENT_VARIABLE = "MODSQUAD_LAUNCHER_PID"
STOP_SECONDS = 60.0  # a rank that was asked to stop may first write a checkpoint
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def run_ranks(command: Sequence[str], ranks: int, log_folder: Path, variables: Mapping[str, str] | None = None) -> int:
    """Run `command` as `ranks` processes that find each other, and wait for them.

    The ranks share the cores that this process may use, unless the user has set OMP_NUM_THREADS.

    Args:
        command: program and arguments, the same for every rank.
        ranks: number of processes.
        log_folder: receives `rank_N.log` of every rank but 0; created if missing.
        variables: further environment variables.

    Returns:
        0 when all ranks succeed, else the status of the rank that failed first; the others are then stopped. On
        Ctrl-C or SIGTERM the ranks are told to stop and waited for; a second Ctrl-C kills them.

    Raises:
        UserError: `log_folder` cannot be written.
    """
    logs = [log_folder / f"rank_{rank}.log" for rank in range(ranks)]
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    previous = signal.signal(signal.SIGTERM, lambda *_: _signal_all(processes, signal.SIGTERM))
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
        for rank, log in enumerate(logs):
            processes.append(_start(command, rank, ranks, port, log, variables or {}))
        failed = _wait(processes)
    except OSError as error:
        raise UserError(f"cannot start the ranks: {error.filename}: {error.strerror}") from error
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(processes)
    if failed is None:
        return 0
    code = processes[failed].returncode
    status = 128 - code if code < 0 else code
    if status not in _INTERRUPTED:
        _show_failure(failed, code, logs[failed])
    return status


def die_with_launcher() -> None:
    """Ask the kernel to kill this process when the launcher that started it is gone (Linux; else do nothing)."""
    launcher = os.environ.get(PARENT_VARIABLE)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)


def _start(
    command: Sequence[str], rank: int, ranks: int, port: int, log: Path, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    env = RankEnv(rank=rank, world=ranks, local_rank=rank, master_port=port)
    environment = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // ranks)),
        **os.environ,
        **variables,
        **env.variables(),
        PARENT_VARIABLE: str(os.getpid()),
    }
    if rank == 0:
        return subprocess.Popen(command, env=environment)
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all succeed (None) or one fails (its rank)."""
    interrupted = False
    while True:
        try:
            codes = [process.poll() for process in processes]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                return _first_cause(processes, failed)
            if all(code == 0 for code in codes):
                return None
            time.sleep(0.05)
        except KeyboardInterrupt:
            # The terminal has sent the signal to the ranks too: they save and exit.
            if interrupted:
                _signal_all(processes, signal.SIGKILL)
            interrupted = True


def _first_cause(processes: Sequence[subprocess.Popen[bytes]], failed: list[int]) -> int:
    """Choose the rank to report: a clear error or a kill from outside tells more than the loss of a peer."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    causes = (code for code in (2, -signal.SIGKILL) if code in codes)
    return next((codes.index(code) for code in causes), failed[0])


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


def _show_failure(rank: int, code: int, log: Path) -> None:
    """Say why a rank failed, unless it is rank 0 and has said so itself."""
    where = f" (all of it: {log})" if rank else ""
    if code < 0:
        reason = " (out of memory?)" if code == -signal.SIGKILL else ""
        print(f"rank {rank} was ended by {signal.Signals(-code).name}{reason}{where}", file=sys.stderr)
    elif rank:
        lines = log.read_text(errors="replace").strip().splitlines()
        print(f"rank {rank}: {lines[-1] if lines else 'ended without a message'}{where}", file=sys.stderr)
