"""Which labels each sample has, as bits of one number per sample.

Millions of samples take a few bytes each, and the numbers may lie in a file that processes share.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Codes = NDArray[np.unsignedinteger[Any]]
"""Sets of at most 64 tasks: bit t tells of task t."""


def code_dtype(tasks: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the smallest type that holds sets of so many tasks.

    Raises:
        ValueError: more than 64.
    """
    for size in (8, 16, 32, 64):
        if tasks <= size:
            return np.dtype(f"uint{size}")
    raise ValueError(f"{tasks} tasks do not fit into 64 bits")


def pack_codes(table: Bools) -> Codes:
    """Return (N,) sets from a (N, T) table."""
    codes = np.zeros(len(table), code_dtype(table.shape[1]))
    for task, column in enumerate(table.T):
        codes |= column.astype(codes.dtype) << codes.dtype.type(task)
    return codes


def unpack_codes(codes: Codes, tasks: int) -> Bools:
    """Return the (N, T) table of (N,) sets."""
    bits = codes.dtype.type(1) << np.arange(tasks, dtype=codes.dtype)
    return np.asarray((codes[:, None] & bits) != 0)


def tasks_of(code: int) -> tuple[int, ...]:
    """Return the tasks of one set, ascending."""
    return tuple(task for task in range(code.bit_length()) if code >> task & 1)


class LabelTable:
    """The labels of N samples for T tasks, a view of stored sets that number their tasks in another way.

    Attributes:
        tasks: T.
    """

    def __init__(self, stored: Codes, bits: Sequence[int | None]) -> None:
        """View stored sets.

        Args:
            stored: (N,) sets; may be memory-mapped, and is only read where asked for.
            bits: T, which bit of `stored` tells of the task; None: no sample has the label.
        """
        self.tasks = len(bits)
        self._stored = stored
        self._bits = tuple(bits)

    @classmethod
    def of(cls, table: Bools) -> "LabelTable":
        """Return the labels that a (N, T) table tells."""
        return cls(pack_codes(table), range(table.shape[1]))

    def __len__(self) -> int:
        return len(self._stored)

    def only(self, wanted: Sequence[bool]) -> "LabelTable":
        """Return the labels of the tasks that are wanted; of the others, there is none."""
        return LabelTable(self._stored, [bit if keep else None for bit, keep in zip(self._bits, wanted, strict=True)])

    def codes(self, rows: slice | NDArray[np.integer[Any]]) -> Codes:
        """Return the label sets of some samples; bit t tells of task t."""
        stored = self._stored[rows]
        codes = np.zeros(len(stored), code_dtype(self.tasks))
        for task, bit in enumerate(self._bits):
            if bit is not None:
                has = (stored >> stored.dtype.type(bit)) & stored.dtype.type(1)
                codes |= has.astype(codes.dtype) << codes.dtype.type(task)
        return codes

    def has(self, task: int, rows: NDArray[np.integer[Any]]) -> Bools:
        """Return (n,) which of the samples have the task's label."""
        bit = self._bits[task]
        if bit is None:
            return np.zeros(len(rows), np.bool_)
        stored = self._stored[rows]
        return np.asarray(stored >> stored.dtype.type(bit) & stored.dtype.type(1), np.bool_)
