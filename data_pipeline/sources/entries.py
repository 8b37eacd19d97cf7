"""What a source found to make samples of, by number."""

from collections.abc import Sequence
from typing import Generic, TypeVar

from data_pipeline.source import PartialSample, Problem

Entry = TypeVar("Entry")


class Entries(Generic[Entry]):
    """Entries of which samples are made, and after them the problems that belong to no sample."""

    def __init__(self, found: Sequence[Entry], problems: Sequence[Problem]) -> None:
        self._found = found
        self._problems = problems

    def __len__(self) -> int:
        return len(self._found) + len(self._problems)

    def __getitem__(self, index: int) -> Entry:
        """Return an entry.

        Raises:
            PartialSample: the number is that of a problem.
        """
        if index >= len(self._found):
            raise PartialSample([self._problems[index - len(self._found)]], None)
        return self._found[index]

    def part(self, numbers: range) -> "Entries[Entry]":
        """Return some of them, numbered from 0, and nothing that belongs to others."""
        start, stop = (max(0, number - len(self._found)) for number in (numbers.start, numbers.stop))
        return Entries(self._found[numbers.start : numbers.stop], self._problems[start:stop])
