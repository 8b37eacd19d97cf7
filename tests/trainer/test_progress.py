"""Progress: plain lines in files, a bar on terminals, nulls shown as dashes."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trainer.progress import terminal_progress


def line(step: int, loss: float | None = 1.25) -> dict[str, Any]:
    return {"step": step, "loss": loss, "step_seconds": 0.5, "mutual_information": {"a": 0.2, "b": 0.4, "c": None}}


def test_a_file_gets_one_line_per_logged_step() -> None:
    out = io.StringIO()
    listener = terminal_progress(8, Console(file=out, width=200))
    listener.on_start(0, 20)
    listener.on_step(9, {})
    listener.on_step(10, line(10))
    listener.on_step(11, line(10))
    listener.on_note("left out: /data/[/x] y/000.tar")
    listener.on_step(20, line(20, loss=None))
    listener.on_end()
    assert out.getvalue().splitlines() == [
        "training from step 0 to 20",
        "step 10/20: loss 1.2500, MI 0.300, 16.0 images/s, 5 s left",
        "left out: /data/[/x] y/000.tar",
        "step 20/20: loss -, MI 0.300, 16.0 images/s, 0 s left",
    ]


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    listener = terminal_progress(8, Console(file=out, width=200, force_terminal=True))
    listener.on_start(0, 20)
    listener.on_step(1, {})
    listener.on_step(10, line(10))
    listener.on_note("look here: [/x] y")
    listener.on_end()
    assert "loss 1.2500, MI 0.300, 16.0 images/s" in out.getvalue()
    assert "look here: [/x] y" in out.getvalue()
    assert "10/20" in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_an_output_that_breaks_is_not_written_to_again(terminal: bool) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            if "19" in text:
                raise OSError(28, "No space left on device")
            return super().write(text)

    out = Full()
    listener = terminal_progress(8, Console(file=out, width=200, force_terminal=terminal))
    listener.on_start(0, 20)
    listener.on_note("19 rooms are damaged")
    before = out.getvalue()
    listener.on_step(20, line(20))
    listener.on_note("look here")
    listener.on_end()
    assert out.getvalue() == before


def test_a_program_whose_output_breaks_ends_well() -> None:
    program = (
        "from trainer.progress import terminal_progress; listener = terminal_progress(8);"
        "listener.on_start(0, 20); listener.on_end(); print('done')"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
