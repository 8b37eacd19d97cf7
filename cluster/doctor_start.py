"""Starts the ranks that check each other (`cluster.doctor_ranks`): here, or on nodes of a SLURM cluster."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.doctor import Finding
from cluster.env import RankEnv, free_port, import_variables
from configs.atomic import cannot_write

_LOCAL_SECONDS = 180.0


def check_local_ranks(folder: Path, ranks: int) -> list[Finding]:
    """Let `ranks` processes of this machine meet and return what they find.

    Raises:
        UserError: `folder` cannot be written.
    """
    port = free_port()
    with _token(folder) as (file, token):
        command = [sys.executable, "-m", "cluster.doctor_ranks", str(file), token]
        started = [
            _start(command, RankEnv(rank=rank, world=ranks, local_rank=rank, master_port=port).variables())
            for rank in range(ranks)
        ]
        try:
            outputs = [process.communicate(timeout=_LOCAL_SECONDS) for process in started]
        except subprocess.TimeoutExpired:
            return [Finding("ranks", "bad", f"{ranks} did not meet within {_LOCAL_SECONDS:g} s", _NO_MEETING)]
        finally:
            for process in started:
                process.kill()
                process.wait()
    failed = [error for process, (_, error) in zip(started, outputs, strict=True) if process.returncode]
    return _read("".join(output for output, _ in outputs), failed[0] if failed else "")


def check_slurm_ranks(
    folder: Path, *, nodes: int, partition: str | None, minutes: int, gpus_per_node: int = 0
) -> list[Finding]:
    """Let a rank per GPU, or one on each of `nodes` nodes, meet through srun, and return what they find.

    Raises:
        UserError: `folder` cannot be written.
    """
    if shutil.which("srun") is None:
        return [Finding("SLURM", "bad", "no srun here", "run this on a login node, or leave --slurm out")]
    asked = subprocess.run(["sinfo", "--noheader", "--format=%P %a %D %T"], capture_output=True, text=True, check=False)
    if asked.returncode:
        return [Finding("SLURM", "bad", _last_line(asked.stderr), "ask whether slurmctld is up, and check SLURM_CONF")]
    seen = Finding("SLURM", "good", "; ".join(asked.stdout.split("\n")).strip("; "))
    options = [
        f"--nodes={nodes}",
        f"--ntasks-per-node={gpus_per_node or 1}",
        f"--time={minutes}",
        f"--immediate={60 * minutes}",
    ]
    options.append("--kill-on-bad-exit=1")  # the other ranks would wait for one that cannot meet them
    if gpus_per_node:
        options.append(f"--gpus-per-node={gpus_per_node}")
    if partition:
        options.append(f"--partition={partition}")
    with _token(folder) as (file, token):
        command = ["srun", *options, sys.executable, "-m", "cluster.doctor_ranks", str(file), token]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment({}))
    return [seen, *_read(done.stdout, done.stderr if done.returncode else "")]


_NO_MEETING = "check firewalls between the ranks, and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"


@contextmanager
def _token(folder: Path) -> Iterator[tuple[Path, str]]:
    """Write a word that nobody can guess into the folder, and take it away again."""
    token = secrets.token_hex(8)
    file = folder.resolve() / f".doctor-{token}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(token, encoding="utf-8")
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        yield file, token
    finally:
        file.unlink(missing_ok=True)


def _start(command: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=_environment(variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, **import_variables(), **variables}


def _read(output: str, error: str) -> list[Finding]:
    found = [Finding(**json.loads(line)) for line in output.splitlines() if line.startswith("{")]
    if not found or (error and all(finding.verdict != "bad" for finding in found)):
        found.append(Finding("ranks", "bad", _last_line(error), _NO_MEETING))
    return found


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
