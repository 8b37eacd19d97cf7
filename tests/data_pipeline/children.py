"""Scripts run as processes of their own group, and what is left of them."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


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


def await_no_process(group: int, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "processes outlive their parent"
        time.sleep(0.05)
