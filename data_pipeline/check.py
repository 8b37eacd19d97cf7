"""What is in a folder of shards, and is it whole: checksums, labels per task, statistics of their values."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from configs.tasks import TaskSpec
from data_pipeline.index import ShardIndex
from data_pipeline.show import load_target
from data_pipeline.source import JOB_FILE, PROBLEMS_FILE, Problem, read_facts, read_problems

_DECODED_SAMPLES = 64


@dataclass(frozen=True)
class TaskReport:
    """Labels of one task. Statistics are over the known pixels of the decoded labels, in the target's space.

    Attributes:
        task: its name.
        labels: samples that have one.
        decoded: labels that the statistics are of.
        known: share of their pixels that are known.
        low, mean, high: least, mean and largest target value; class tasks: of the class ids (the likeliest, for
            vectors). NaN where nothing is known.
    """

    task: str
    labels: int
    decoded: int
    known: float
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class CheckReport:
    """What `check_shards` found.

    Attributes:
        place: the shards' folder or URL.
        shards, samples: their numbers.
        size: side of the stored images in pixels.
        file_bytes: size of all shards.
        fingerprint: identifies the bytes of all shards.
        tasks: one report per task that has labels, in the order of `ShardIndex.task_table`.
        facts: what the packing noted about the source as a whole.
        problems: what the packing left out.
    """

    place: str
    shards: int
    samples: int
    size: int
    file_bytes: int
    fingerprint: str
    tasks: tuple[TaskReport, ...]
    facts: tuple[str, ...]
    problems: tuple[Problem, ...]

    def table(self) -> Table:
        """Return the report for a terminal: one row per task, between the shards and what else is known of them."""
        table = Table(
            "task",
            *(Column(name, justify="right") for name in ("labels", "decoded", "known", "low", "mean", "high")),
            title=(
                f"{self.samples} samples of {self.size} x {self.size} pixels in {self.shards} shards, "
                f"{self.file_bytes / 2**20:.1f} MiB\nchecksums good, fingerprint {self.fingerprint}"
            ),
            caption=Text("\n".join((*self.facts, *_summary(self.problems)))),  # Not markup: paths may hold brackets.
            caption_justify="left",
        )
        for row in self.tasks:
            counts = (str(row.labels), str(row.decoded), f"{row.known:.1%}")
            table.add_row(row.task, *counts, *(f"{value:.4g}" for value in (row.low, row.mean, row.high)))
        return table


def check_shards(place: Path | str) -> CheckReport:
    """Verify every shard's checksum, decode labels of samples spread over all shards, and count.

    Raises:
        UserError: no index, a missing, truncated or changed shard, or a member that cannot be decoded.
    """
    index = ShardIndex.load(place)
    index.verify()
    job, problems = index.storage.find(JOB_FILE), index.storage.find(PROBLEMS_FILE)
    specs = [spec for name, spec in index.task_table.items() if name in index.tasks]
    return CheckReport(
        place=index.storage.place,
        shards=index.shard_count,
        samples=len(index),
        size=index.size,
        file_bytes=index.file_bytes,
        fingerprint=index.fingerprint,
        tasks=tuple(_report_task(index, spec) for spec in specs),
        facts=read_facts(job.parent) if job else (),
        problems=read_problems(problems.parent) if problems else (),
    )


def _report_task(index: ShardIndex, spec: TaskSpec) -> TaskReport:
    labelled = np.flatnonzero(index.available([spec.name])[:, 0])
    chosen = labelled[np.unique(np.linspace(0, len(labelled) - 1, _DECODED_SAMPLES).round().astype(int))]
    known, pools = [], []
    for sample in chosen.tolist():
        target = load_target(index, sample, spec)
        mask = target.mask
        field = target.values if spec.dense else target.values.argmax(1, keepdim=True)
        field = field.reshape(len(mask), -1, *mask.shape[2:])
        values = field[mask.expand_as(field)].double().numpy()
        known.append(mask.float().mean().item())
        if values.size:
            pools.append((values.min(), values.sum(), values.size, values.max()))
    low, total, size, high = np.array(pools).T if pools else np.full((4, 1), np.nan)
    mean = total.sum() / size.sum()
    return TaskReport(
        spec.name, len(labelled), len(chosen), float(np.mean(known)), float(low.min()), float(mean), float(high.max())
    )


def _summary(problems: Sequence[Problem]) -> list[str]:
    """How many problems of which task, with the reason of the first one of each."""
    counts = Counter(problem.task or "whole samples" for problem in problems)
    first = {problem.task or "whole samples": problem for problem in reversed(problems)}
    return [f"left out: {count} of {task}, first: {first[task]}" for task, count in counts.most_common()]
