"""metrics.jsonl: what is summed between two lines, and the file itself.

Every rank adds what it sees; one packed reduction per line brings the sums of all ranks to rank 0, which writes.

For the steps since the line before, a line holds means over steps (`loss`, `matching_loss`, `mutual_information` in
nats per layer), means over pairs (`task_loss`), and means over steps and ranks (`step_seconds`, `data_wait_seconds`).
A step without an update, its gradient not being finite, is left out of them and of `pairs`. `images`, `pairs`,
`bad_steps` and `skipped` (shard -> reason -> damaged members left out) count since the start of the run. A number that
does not exist is null.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.atomic import cannot_write, write_text_atomically
from configs.errors import UserError
from data_pipeline.constants import constant
from trainer.objective import StepStatistics

METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"


class Journal:
    """Running sums of one rank between two lines.

    Now and then rank 0 takes over the sums of all ranks (`trainer.run_state`), and the others start from zero, so that
    the ranks' sums always add up to those of the run; that is what a checkpoint keeps.
    """

    def __init__(self, tasks: Sequence[str], layers: Sequence[str], device: torch.device) -> None:
        """Start with nothing summed; `layers` are those with mutual information."""
        self._tasks, self._layers = tuple(tasks), tuple(layers)
        # Steps, seconds, waited seconds, loss, matching loss; then per layer; then loss and pairs per task; then pairs
        # per task since the start of the run.
        self._sizes = [5, len(layers), len(tasks), len(tasks), len(tasks)]
        self._sums = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)

    def add_micro_batch(self, loss: Tensor, statistics: StepStatistics, scale: float) -> None:
        """Add one forward pass: its loss (a scalar) and statistics; `scale` passes over all ranks make a step."""
        information = [statistics.mutual_information[layer] for layer in self._layers]
        self._sums += torch.cat(
            [
                torch.zeros(3, device=loss.device, dtype=torch.float64),
                torch.stack([loss, statistics.matching_loss, *information]).double() / scale,
                statistics.loss_sum_T.double(),
                statistics.pairs_T.double(),
                statistics.pairs_T.double(),
            ]
        )

    def add_step(self, seconds: float, wait_seconds: float, world: int) -> None:
        """Add one finished step and its wall time, of which `wait_seconds` were spent waiting for data."""
        self._sums[:3] += constant([1.0, seconds, wait_seconds], self._sums) / world

    @property
    def sums(self) -> Tensor:
        """This rank's sums, one float64 vector that adds up over ranks."""
        return self._sums

    def restore(self, total: Tensor, rank: int) -> None:
        """Continue from the sums of all ranks, on any number of them."""
        self._sums.copy_(total if rank == 0 else torch.zeros_like(total))

    def line(self, total: Tensor) -> dict[str, Any]:
        """Return what the sums of all ranks say, in the form of a line."""
        common, information, losses, pairs, pairs_ever = torch.split(total, self._sizes)
        steps, *means = common.tolist()
        seconds, waited, loss, matching = (_quotient(value, steps) for value in means)
        return {
            "loss": loss,
            "task_loss": {
                name: _quotient(value, count)
                for name, value, count in zip(self._tasks, losses.tolist(), pairs.tolist(), strict=True)
            },
            "matching_loss": matching,
            "mutual_information": {
                name: _quotient(value, steps) for name, value in zip(self._layers, information.tolist(), strict=True)
            },
            "pairs": {name: int(count) for name, count in zip(self._tasks, pairs_ever.tolist(), strict=True)},
            "step_seconds": seconds,
            "data_wait_seconds": waited,
        }

    def next_line(self) -> None:
        """Forget what belongs to the line just written; counts since the start of the run stay."""
        self._sums[: -len(self._tasks)] = 0.0


def finite(value: float) -> float | None:
    """Return `value`, or None (null in JSON) where it is not finite."""
    return value if math.isfinite(value) else None


def _quotient(value: float, count: float) -> float | None:
    return finite(value / count) if count else None


def append_line(run_dir: Path, line: Mapping[str, Any]) -> None:
    """Append one line to metrics.jsonl; see `append_lines`."""
    append_lines(run_dir / METRICS_FILE, [line])


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines to a file and push them to the disk; a reader never sees half of one but after a crash.

    Raises:
        UserError: no space, or the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def truncate_lines(run_dir: Path, step: int) -> None:
    """Drop what metrics.jsonl and skipped.jsonl say of later steps than `step`, and last lines that a crash cut short.

    Raises:
        UserError: a line is no JSON object with a step; names it.
    """
    for path in (run_dir / METRICS_FILE, run_dir / SKIPPED_FILE):
        if path.is_file():
            complete = path.read_bytes().rpartition(b"\n")[0].splitlines()
            kept = [line for number, line in enumerate(complete, 1) if _step(line, f"{path}, line {number},") <= step]
            write_text_atomically(path, "".join(f"{line.decode()}\n" for line in kept))


def _step(line: bytes, where: str) -> int:
    try:
        return int(json.loads(line.decode())["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{where} is damaged: delete that line, or restore the file") from None
