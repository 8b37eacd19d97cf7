"""The order of images whose tasks are settled, so that all tasks advance together, each at its rate.

N images, T tasks, G distinct sets of tasks. Time grows with N alone: millions of images take seconds.
"""

from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from data_pipeline.planning.assignment import label_signatures
from data_pipeline.planning.labels import Codes, unpack_codes

Ints = NDArray[np.int64]

# Weight of keeping an image near its place against balance: see `interleave_sets`.
_PULL = 4.0
# Images that one greedy order runs over; larger inputs are cut, and the pieces ordered in lock-step.
_PIECE = 65536
# Positions whose units are in memory at once.
_BLOCK = 1 << 16


def interleave(served: Codes, tasks: int, reach: float) -> Ints:
    """Return (N,) the images in an order in which the tasks advance together.

    Args:
        served: (N,) at least one task of each image, in the order wished for.
        tasks: T.
        reach: places that an image may move before that weighs as much as `_PULL` units of imbalance; for images that
            serve several tasks.
    """
    if not (served & (served - served.dtype.type(1))).any():
        return interleave_single(served, tasks)
    return interleave_sets(served, tasks, reach)


def interleave_single(served: Codes, tasks: int) -> Ints:
    """Order images of one task each: every prefix has every task within one unit of its rate.

    Images of one task keep their order.
    """
    bits = served.dtype.type(1) << np.arange(tasks, dtype=served.dtype)
    task = np.searchsorted(bits, served).astype(np.uint8)
    paced = pace_single(np.bincount(task, minlength=tasks))
    order = np.empty(len(served), np.int64)
    order[np.argsort(paced, kind="stable")] = np.argsort(task, kind="stable")
    return order


def pace_single(load: Ints) -> NDArray[np.uint8]:
    """Return the task of each of sum(load) positions, so that every prefix has each within one unit of its rate.

    `assignment.pace_tasks` for one task per position, where the unit with the earliest deadline is always a right
    choice (Liu and Layland 1973): the j-th unit of a task, from 0, becomes available at floor(j N / load) and is due
    before ceil((j + 1) N / load). About half a microsecond per position.
    """
    positions, tasks = int(load.sum()), len(load)
    paced = np.empty(positions, np.uint8)
    due: list[int] = []
    for first in range(0, positions, _BLOCK):
        end = min(first + _BLOCK, positions)
        release, urgency = _units_released(load, first, end)
        chosen = []
        unit = 0
        for position in range(first, end):
            while release[unit] <= position:
                heappush(due, urgency[unit])
                unit += 1
            chosen.append(heappop(due) % tasks)
        paced[first:end] = chosen
    return paced


def _units_released(load: Ints, first: int, end: int) -> tuple[list[int], list[int]]:
    """Return when units become available, from `first` to before `end`, and their deadline * T + task.

    In the order of the former, with `end` behind the last.
    """
    positions = int(load.sum())
    begin, behind = -(-first * load // positions), -(-end * load // positions)
    counts = behind - begin
    task = np.repeat(np.arange(len(load)), counts)
    unit = np.arange(len(task)) - np.repeat(np.cumsum(counts) - counts, counts) + begin[task]
    release = unit * positions // load[task]
    deadline = -(-(unit + 1) * positions // load[task])
    order = np.argsort(release, kind="stable")
    return [*release[order].tolist(), end], (deadline * len(load) + task)[order].tolist()


def interleave_sets(served: Codes, tasks: int, reach: float) -> Ints:
    """Order images of several tasks each by greedy vector balancing, which has no such bound as `interleave_single`.

    At each position comes the image that leaves the smallest squared distance between what each task has had and its
    rate so far, less a reward for images whose turn is overdue. Beyond `_PIECE` images, equal pieces of the wished
    order are ordered each at its own rates, all pieces at once.
    """
    images = len(served)
    sets, group, _ = label_signatures(served)
    vectors = unpack_codes(sets, tasks).astype(np.float32)
    pieces = max(1, images // _PIECE)
    bounds = np.arange(pieces + 1) * images // pieces
    sizes = np.diff(bounds)
    piece = np.repeat(np.arange(pieces), sizes)
    count = np.bincount(piece * len(sets) + group, minlength=pieces * len(sets)).reshape(pieces, -1)
    queue = np.append(np.argsort(piece * len(sets) + group, kind="stable"), images)
    last = np.cumsum(count).reshape(count.shape)
    place = last - count
    rate = (count @ vectors / sizes[:, None]).astype(np.float32)

    def turn(rows: Ints, queued: Ints) -> NDArray[np.float32]:
        return ((queue[queued] - bounds[rows]) * (_PULL / reach)).astype(np.float32)

    every = np.arange(pieces)
    wish = np.where(count > 0, turn(every[:, None], place), np.float32(np.inf))
    lag = np.zeros((pieces, tasks), np.float32)
    order = np.empty(images, np.int64)
    score = np.empty(count.shape, np.float32)
    for position in range(int(sizes.max())):
        if position == sizes.min():  # sizes differ by one at most
            every = np.flatnonzero(sizes > position)
            wish, lag, rate, score = wish[every], lag[every], rate[every], score[every]
        lag += rate
        # |lag - v|^2 = |lag|^2 - v . (2 lag - 1), as v holds zeros and ones.
        np.matmul(2 * lag - 1, vectors.T, out=score)
        score -= wish
        best = score.argmax(axis=1)
        queued = place[every, best]
        order[bounds[every] + position] = queue[queued]
        lag -= vectors[best]
        place[every, best] = queued + 1
        more = queued + 1 < last[every, best]
        wish[np.arange(len(every)), best] = np.where(more, turn(every, queued + 1), np.float32(np.inf))
    return order
