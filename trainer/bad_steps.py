"""Steps without an update, their gradient not being finite: how many in a row, and when that is too many."""

from collections.abc import Sequence

import torch.distributed as dist

from configs.errors import UserError
from trainer.distributed.agreement import on_all

_SHOWN_KEYS = 16


class BadSteps:
    """Counts bad steps in a row, the same on every rank, as all ranks share the gradient norm."""

    def __init__(self, most: int, group: dist.ProcessGroup) -> None:
        """Allow fewer than `most` in a row."""
        self._most, self._group, self._in_a_row = most, group, 0

    def forget(self) -> None:
        """A good step ends the row."""
        self._in_a_row = 0

    def add(self, step: int, images: range, suspects: Sequence[str], batch: Sequence[str]) -> None:
        """Count one. A collective call once the row is too long.

        Args:
            step: number of the step, from 1.
            images: places of its images in the plan.
            suspects: this rank's samples in passes whose task loss is not finite.
            batch: all samples of this rank's passes.

        Raises:
            UserError: too many in a row; names the samples.
        """
        self._in_a_row += 1
        if self._in_a_row < self._most:
            return
        of_ranks = on_all(self._group, lambda: (tuple(suspects), tuple(batch)))
        found, used = ([key for of_rank in of_ranks for key in of_rank[part]] for part in (0, 1))
        cause = (
            f"task losses were not finite in passes with the samples {_some(found)}: look at these, or "
            if found
            else f"all task losses of its samples ({_some(used)}) were finite, so the gradient overflowed: "
        )
        raise UserError(
            f"no finite gradient in {self._in_a_row} steps in a row, the last one step {step} (images {images.start} "
            f"to {images.stop - 1} of the plan); {cause}train anew with a lower optim.lr (train.init_from takes the "
            "weights that `modsquad export` writes of this run)"
        )


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(keys[:_SHOWN_KEYS]) + more
