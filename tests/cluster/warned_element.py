"""What the elements of a test's array run: the last one is warned once, when the first is done and the second runs."""

import os
from pathlib import Path

from cluster.env import RankEnv
from cluster.jobs import job_state
from tests.services.waiting import wait_until

ENTRY = f"{__name__}:train_rank"
WARNED_STATUS = 140
FIRST, SECOND, LAST = range(3)


def train_rank(config: str, env: RankEnv) -> int:
    """Note the start in the folder that the configuration names; return the exit status."""
    folder, array = Path(Path(config).read_text()), os.environ["SLURM_ARRAY_JOB_ID"]
    element = int(os.environ["SLURM_ARRAY_TASK_ID"])
    with (folder / "starts").open("a") as file:
        file.write(f"{element}\n")
    if element == SECOND:
        wait_until(lambda: starts(folder).count(LAST) == 2, 100, "the last element starts again")
    if element == LAST and starts(folder).count(LAST) == 1:
        wait_until(lambda: SECOND in starts(folder), 60, "the second element runs")
        wait_until(lambda: job_state(f"{array}_{FIRST}").is_over, 60, "the first element is over")
        return WARNED_STATUS
    return 0


def starts(folder: Path) -> list[int]:
    """Return the element of each start, in their order."""
    return [int(line) for line in (folder / "starts").read_text().split()]
