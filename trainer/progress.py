"""Progress of training on the terminal: a live bar, or plain lines where the output is no terminal."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.terminal import say


class StepListener(Protocol):
    """Who wants to hear about steps; only rank 0 calls it."""

    def on_start(self, step: int, steps: int) -> None:
        """Training starts after `step` finished steps of `steps`."""

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Step `step` (from 1) is done; `metrics` is the latest line of metrics.jsonl, empty before the first."""

    def on_note(self, text: str) -> None:
        """Something happened that the user should know."""

    def on_end(self) -> None:
        """Training has ended, well or not."""


class PlainProgress:
    """One line of text per line of metrics.jsonl, for log files."""

    def __init__(self, console: Console, images_per_step: int) -> None:
        """Print to `console`; `images_per_step` turns seconds per step into images per second."""
        self._console, self._images = console, images_per_step
        self._steps = 0

    def on_start(self, step: int, steps: int) -> None:
        """Say where training starts."""
        self._steps = steps
        say(f"training from step {step} to {steps}", console=self._console)

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Print a line if this step has logged one."""
        if metrics.get("step") != step:
            return
        seconds = metrics["step_seconds"]
        left = f", {seconds * (self._steps - step):.0f} s left" if seconds else ""
        say(f"step {step}/{self._steps}: {describe(metrics, self._images)}{left}", console=self._console)

    def on_note(self, text: str) -> None:
        """Print it."""
        say(text, console=self._console)

    def on_end(self) -> None:
        """Do nothing: the last line stands."""


class LiveProgress:
    """A bar with loss, mutual information, throughput and the time left."""

    def __init__(self, console: Console, images_per_step: int) -> None:
        """Draw on `console`; `images_per_step` turns seconds per step into images per second."""
        self._images = images_per_step
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def on_start(self, step: int, steps: int) -> None:
        """Show the bar."""
        self._bar.start()
        self._task = self._bar.add_task("training", total=steps, completed=step, text="")

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Move the bar; the numbers are those of the latest line."""
        self._bar.update(self._task, completed=step, text=describe(metrics, self._images) if metrics else "")

    def on_note(self, text: str) -> None:
        """Print it above the bar."""
        say(text, console=self._bar.console)

    def on_end(self) -> None:
        """Leave the bar where it is."""
        self._bar.stop()


class ForgivingProgress:
    """Passes on what it hears until the output breaks: neither a full disk nor a closed pipe shall end a training."""

    def __init__(self, listener: StepListener, console: Console) -> None:
        """Tell `listener`, which prints to `console`."""
        self._listener, self._console = listener, console
        self._broken = False

    def on_start(self, step: int, steps: int) -> None:
        """Pass it on."""
        self._pass_on(lambda: self._listener.on_start(step, steps))

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Pass it on."""
        self._pass_on(lambda: self._listener.on_step(step, metrics))

    def on_note(self, text: str) -> None:
        """Pass it on."""
        self._pass_on(lambda: self._listener.on_note(text))

    def on_end(self) -> None:
        """Pass it on."""
        self._pass_on(self._listener.on_end)

    def _pass_on(self, tell: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            tell()
        except OSError:
            self._broken = True
            _discard_output(self._console)


def _discard_output(console: Console) -> None:
    """Let what is still printed, or waits to be written at the end of the program, vanish."""
    with suppress(OSError):  # no file of the system's
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, console.file.fileno())
        os.close(null)


def terminal_progress(images_per_step: int, console: Console | None = None) -> StepListener:
    """Return the listener that suits `console` (None: standard output), and outlives it."""
    console = console or Console()
    listener = (LiveProgress if console.is_terminal else PlainProgress)(console, images_per_step)
    return ForgivingProgress(listener, console)


def describe(metrics: Mapping[str, Any], images_per_step: int) -> str:
    """Return a line's loss, mean mutual information over layers and images per second; `-` for what is null."""
    information = [value for value in metrics["mutual_information"].values() if value is not None]
    mean = sum(information) / len(information) if information else None
    seconds = metrics["step_seconds"]
    rate = images_per_step / seconds if seconds else None
    return f"loss {_number(metrics['loss'], 4)}, MI {_number(mean, 3)}, {_number(rate, 1)} images/s"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
