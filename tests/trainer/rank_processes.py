"""Ranks of a run as programs of their own, for tests that kill, stop and signal them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.env import RankEnv, free_port

_ROOT = Path(__file__).parent.parent.parent
PROGRAM = (sys.executable, "-m", "tests.trainer.noted_training")


def start_ranks(
    folder: Path,
    ranks: int,
    *overrides: str,
    program: Sequence[str] = PROGRAM,
    only: Sequence[int] | None = None,
    working_folders: Sequence[Path] | None = None,
) -> list[subprocess.Popen[str]]:
    """Start ranks of `program` (all, or `only` some) that train on the shards in `folder`; stderr is a pipe.

    They work in this process's folder, or each in its own of `working_folders`.
    """
    port = free_port()
    return [
        subprocess.Popen(
            [*program, str(folder), *overrides],
            env={
                **os.environ,
                **RankEnv(rank=rank, world=ranks, local_rank=rank, master_port=port).variables(),
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                "PYTHONPATH": str(_ROOT),
            },
            cwd=working_folders[rank] if working_folders else None,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in (range(ranks) if only is None else only)
    ]


def ends(processes: list[subprocess.Popen[str]], seconds: float = 120.0) -> list[tuple[int, str]]:
    """Wait for all; return (exit status, what it wrote to stderr) of each."""
    deadline = time.monotonic() + seconds
    results = []
    for process in processes:
        _, said = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        results.append((process.returncode, said))
    return results


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(run_dir: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in lines_of(run_dir)):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), "ended before it was interrupted"
        time.sleep(0.01)
