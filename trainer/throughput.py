"""Images per second as the lines of metrics.jsonl tell them: a run may go on with another `train.images_per_step`."""

import math
from collections.abc import Sequence

from trainer.run_files import StepRecord


def throughput(lines: Sequence[StepRecord]) -> list[float]:
    """Return the images per second of each line since the one before (the first: since step 0); NaN where unknown."""
    rates, step, images = [], 0, 0
    for line in lines:
        seconds = (line.step - step) * line.step_seconds
        rates.append((line.images - images) / seconds if seconds > 0 else math.nan)
        step, images = line.step, line.images
    return rates
