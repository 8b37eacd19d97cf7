"""Scripts run as processes of their own group, and what is left of them."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

_WITH_MOUNTS = ("unshare", "--map-root-user", "--mount")


def start_script(path: Path, text: str, *arguments: str) -> "subprocess.Popen[str]":
    """Write and start a script; its process id is also the id of its group."""
    path.write_text(text)
    return subprocess.Popen(
        [sys.executable, str(path), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def can_mount() -> bool:
    """Whether `run_with_mounts` works here: root, or user namespaces."""
    command = [*_WITH_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and not subprocess.run(command, capture_output=True, check=False).returncode


def run_with_mounts(path: Path, text: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Write a script and run it to its end where it may mount file systems that nobody else sees."""
    path.write_text(text)
    return subprocess.run(
        [*_WITH_MOUNTS, sys.executable, str(path), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def await_no_process(group: int, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "processes outlive their parent"
        time.sleep(0.05)
