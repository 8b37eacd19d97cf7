"""What a dataset must offer to be packed, and how it tells what is wrong with it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from configs.errors import UserError
from data_pipeline.sample import Sample

JOB_FILE = "pack.json"
PROBLEMS_FILE = "problems.jsonl"


class Samples(Protocol):
    """Samples by number, from 0 on: picklable, and the same in every process.

    `samples[i]` raises `PartialSample` where a part of sample i cannot be used, and any other `UserError` where all of
    it cannot.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Source(Samples, Protocol):
    """All samples of a dataset."""

    @property
    def name(self) -> str:
        """Identifies the content: sources of one name yield equal samples."""
        ...

    def part(self, samples: range) -> Samples:
        """Return some samples, numbered from 0, as a process is sent them: no larger than what they are made of."""
        ...


@dataclass(frozen=True)
class Problem:
    """Something of a source that is not in the shards.

    Attributes:
        key: the sample.
        task: the label that is left out; empty where it is the whole sample.
        reason: what is wrong.
        path: the file at fault, where there is one.
    """

    key: str
    task: str
    reason: str
    path: str = ""

    def __str__(self) -> str:
        place = f", {self.path}" if self.path else ""
        return f"sample {self.key}{f', {self.task}' if self.task else ''}{place}: {self.reason}"


class PartialSample(UserError):
    """A sample of which something cannot be used.

    Attributes:
        problems: what is wrong, at least one.
        sample: what remains; None if nothing does.
    """

    def __init__(self, problems: list[Problem], sample: Sample | None) -> None:
        super().__init__(str(problems[0]) + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
        self.problems = problems
        self.sample = sample


def format_problems(problems: Sequence[Problem]) -> str:
    """Return the content of a problems file: one JSON object per line."""
    return "".join(json.dumps(asdict(problem)) + "\n" for problem in problems)


def read_problems(folder: Path) -> tuple[Problem, ...]:
    """Return what the packing of `folder` left out; empty for shards from elsewhere.

    Raises:
        UserError: the file was damaged.
    """
    path = folder / PROBLEMS_FILE
    if not path.is_file():
        return ()
    try:
        return tuple(Problem(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: restore it, or delete {folder} and pack the data again") from None


def read_facts(folder: Path) -> tuple[str, ...]:
    """Return what the packing of `folder` noted about its source as a whole; empty for shards from elsewhere.

    Raises:
        UserError: the file was damaged.
    """
    path = folder / JOB_FILE
    if not path.is_file():
        return ()
    try:
        return tuple(str(fact) for fact in json.loads(path.read_text(encoding="utf-8")).get("facts", ()))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged: restore it, or delete {folder} and pack the data again") from None
