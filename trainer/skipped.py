"""What training leaves out of its batches since it is damaged: counted over all ranks, limited, listed.

`data_pipeline.tolerant` leaves out; here the ranks agree on the count after each step, so that all of them stop
together once it is too large. RUN/skipped.jsonl holds one object per damaged member, in the order of the steps.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from configs.errors import UserError
from data_pipeline.skips import Skip, SkipCounts, skip_line
from trainer.distributed.agreement import on_all, on_each
from trainer.journal import SKIPPED_FILE, append_lines


class SkipRecorder:
    """Keeps the list of a run, on every rank.

    Attributes:
        on_rank: (shard, reason) -> members that this rank has left out since it started.
    """

    def __init__(self, run_dir: Path, most: int, group: dist.ProcessGroup) -> None:
        """Allow `most` different samples with damage; 0: the loader raises at the first, and nothing is recorded."""
        self.on_rank: Counter[tuple[str, str]] = Counter()
        self._run_dir, self._most, self._group = run_dir, most, group

    def record(self, counts: SkipCounts, mine: Sequence[Skip], step: int) -> list[Skip]:
        """Add what this rank has left out in `step` to the counts of all ranks, and list what was not met before.

        A collective call: one number on the CPU where nothing was left out, nothing at all where nothing may be.

        Args:
            counts: of the run, the same on all ranks; updated.
            mine: what this rank has left out.
            step: number of the step, from 1.

        Returns:
            Members that were met for the first time, on all ranks.

        Raises:
            UserError: on all ranks: more samples are damaged than may be, or the list cannot be written.
        """
        self.on_rank.update((skip.shard, skip.reason) for skip in mine)
        if not self._most:
            return []
        found = torch.tensor(len(mine))
        dist.all_reduce(found, group=self._group)
        if not found:
            return []
        new = counts.add(skip for skips in on_all(self._group, lambda: list(mine)) for skip in skips)
        is_main = dist.get_rank(self._group) == 0
        path = self._run_dir / SKIPPED_FILE
        on_each(self._group, lambda: append_lines(path, [skip_line(skip, step) for skip in new]) if is_main else None)
        if counts.samples > self._most:
            raise UserError(
                f"{counts.samples} training samples are damaged, more than data.max_bad_samples {self._most}: restore "
                f"what {path} lists, or allow more; the last: {new[-1].message}"
            )
        return new


def describe_skips(counts: SkipCounts, run_dir: Path) -> str:
    """Return one line for the end of a run."""
    shards = len(counts.by_shard())
    return (
        f"left out: damaged members of {counts.samples} training samples in {shards} shards, listed in "
        f"{run_dir / SKIPPED_FILE}"
    )
