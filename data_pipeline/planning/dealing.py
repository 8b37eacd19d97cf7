"""Dealing a global batch to ranks: alike in every part, or each task's pairs to few ranks.

Whoever gets which pair, the batch is the same: augmentation depends on the image and the epoch, and losses are divided
by the pairs of the global batch.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.planning.plan import Slot


@dataclass(frozen=True)
class TaskHomes:
    """Which ranks of an expert group get which tasks: the pairs sorted by task, in equal parts.

    Attributes:
        ranks: of an expert group.
        task_order: all tasks, in the order in which their pairs fill the ranks.
    """

    ranks: int
    task_order: tuple[int, ...]


def deal_slots(slots: Sequence[Slot], parts: int) -> list[tuple[Slot, ...]]:
    """Deal a global batch into equal parts whose tasks are as mixed as those of the whole.

    Args:
        slots: a multiple of `parts`.
        parts: ranks times accumulation steps.
    """
    assert len(slots) % parts == 0, "a global batch divides evenly"
    ordered = sorted(slots, key=lambda slot: slot.tasks)
    return [tuple(ordered[part::parts]) for part in range(parts)]


def deal_pairs(slots: Sequence[Slot], parts: int, homes: TaskHomes) -> list[tuple[Slot, ...]]:
    """Deal a global batch so that each task's pairs go to few ranks; equally many pairs to every part, to within one.

    An image whose tasks live on several ranks is in a part of each, with the tasks that live there. Among the parts of
    one home, images stay whole as far as that goes.

    Args:
        slots: any number.
        parts: ranks times accumulation steps, a multiple of `homes.ranks`; part p is for place p % ranks of a group.
        homes: where tasks live.
    """
    turn = {task: number for number, task in enumerate(homes.task_order)}
    pairs = [(turn[task], number, task) for number, slot in enumerate(slots) for task in slot.tasks]
    dealt: list[tuple[Slot, ...]] = [()] * parts
    for home, of_home in enumerate(_cut(sorted(pairs), homes.ranks)):
        by_image = sorted(of_home, key=lambda pair: pair[1:])
        for part, of_part in zip(range(home, parts, homes.ranks), _cut(by_image, parts // homes.ranks), strict=True):
            dealt[part] = _as_slots(slots, of_part)
    return dealt


_Pair = tuple[int, int, int]
"""Turn of its task, number of its slot, task."""


def _cut(pairs: list[_Pair], parts: int) -> list[list[_Pair]]:
    ends = [len(pairs) * part // parts for part in range(parts + 1)]
    return [pairs[begin:end] for begin, end in itertools.pairwise(ends)]


def _as_slots(slots: Sequence[Slot], pairs: Sequence[_Pair]) -> tuple[Slot, ...]:
    tasks: dict[int, list[int]] = defaultdict(list)
    for _, number, task in pairs:
        tasks[number].append(task)
    return tuple(
        Slot(slots[number].sample, tuple(sorted(served)), slots[number].epoch)
        for number, served in sorted(tasks.items())
    )
