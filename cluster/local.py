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

from cluster.env import RankEnv, free_port

PARENT_VARIABLE = "MODSQUAD_LAUNCHER_PID"
STOP_SECONDS = 60.0  # a rank that was asked to stop may first write a checkpoint
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def cpu_environment(ranks: int) -> dict[str, str]:
    """Return environment variables that make torch fast on CPUs; they only work when set before a process starts.

    glibc returns every tensor above 32 MB to the system and pays page faults to get it back, unless told to keep it.
    oneDNN's default cache of 1024 compiled kernels is smaller than the shapes that expert layers produce in bf16.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384",
        "OMP_NUM_THREADS": str(threads),
    }


def run_ranks(command: Sequence[str], ranks: int, log_folder: Path, variables: Mapping[str, str] | None = None) -> int:
    """Run `command` as `ranks` processes that find each other, and wait for them.

    Args:
        command: program and arguments, the same for every rank.
        ranks: number of processes.
        log_folder: receives `rank_N.log` of every rank but 0; created if missing.
        variables: further environment variables.

    Returns:
        0 when all ranks succeed, else the status of the rank that failed first; the others are then stopped. On
        Ctrl-C or SIGTERM the ranks are told to stop and waited for; a second Ctrl-C kills them.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    logs = [log_folder / f"rank_{rank}.log" for rank in range(ranks)]
    port = free_port()
    processes = [_start(command, rank, ranks, port, logs[rank], variables or {}) for rank in range(ranks)]
    previous = signal.signal(signal.SIGTERM, lambda *_: _signal_all(processes, signal.SIGTERM))
    try:
        failed = _wait(processes)
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(processes)
    if failed is None:
        return 0
    if failed:
        _show_failure(failed, logs[failed])
    return _exit_status(processes[failed].returncode)


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
        **os.environ,
        **cpu_environment(ranks),
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
    """Choose the rank to report: one that ended by itself tells more than one that lost its peer."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    clear = [rank for rank, code in enumerate(codes) if code == 2]
    return (clear or failed)[0]


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


def _show_failure(rank: int, log: Path) -> None:
    lines = log.read_text(errors="replace").strip().splitlines()
    print(f"rank {rank}: {lines[-1] if lines else 'ended without a message'} (all of it: {log})", file=sys.stderr)


def _exit_status(code: int) -> int:
    return 128 - code if code < 0 else code
