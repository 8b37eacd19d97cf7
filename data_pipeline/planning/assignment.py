"""Which tasks each image serves, when it serves fewer than it has labels for.

`fair_budgets` divides the work among label signatures, exactly max-min fair; `deal_budgets` turns that into tasks per
image. `rotate_tasks` and `pace_tasks` say which tasks come at which position so that all advance together;
`planning.interleave` orders images whose tasks are settled to the same end. All are pure functions. N images, T tasks,
G signatures (distinct sets of labels).
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_pipeline.planning.labels import Codes, code_dtype

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def label_signatures(codes: Codes) -> tuple[Codes, Ints, Ints]:
    """Group images by their set of labels.

    Args:
        codes: (N,) the images' label sets.

    Returns:
        (G,) the distinct sets, ascending, (N,) each image's among them, (G,) how many images have it.
    """
    sets, group, count = np.unique(codes, return_inverse=True, return_counts=True)
    return sets, group, count


def fair_budgets(labels: Bools, count: Ints, tasks_per_image: int, shares: NDArray[np.float64]) -> Ints:
    """Divide the tasks' work among label signatures so that the tasks' loads are max-min fair.

    The loads that are possible are the integral bases of a polymatroid, on which the max-min fair vector is the one
    that minimises sum_t load_t^2 / share_t (Fujishige 1980); it is reached when no transfer of one unit between two
    tasks lowers that sum (M-convexity: Murota, Discrete Convex Analysis, theorem 6.26). A transfer may pass through
    other tasks: u gives to a in one signature, a to v in another.

    Args:
        labels: (G, T) label sets.
        count: (G,) images of each.
        tasks_per_image: m; an image with fewer labels serves them all.
        shares: (T,) positive, what the loads should be proportional to.

    Returns:
        (G, T): in how many of its images a signature serves a task. Rows sum to count * min(m, labels of the row).
    """
    per_image = np.minimum(tasks_per_image, labels.sum(axis=1))
    # A start near the end: equal parts, rounded so that rows sum exactly.
    seen = np.cumsum(labels, axis=1)
    work, size = (count * per_image)[:, None], seen[:, -1:]
    budget = np.where(labels, seen * work // size - (seen - 1) * work // size, 0)
    while _transfer(budget, np.where(labels, count[:, None], 0), shares):
        pass
    return budget


def _transfer(budget: Ints, limit: Ints, shares: NDArray[np.float64]) -> bool:
    """Move work from an overloaded task to an underloaded one, in place; False: nothing is left to improve."""
    load = budget.sum(axis=0)
    movable = (budget > 0).T.astype(np.float32) @ (budget < limit).astype(np.float32) > 0
    for giver in np.argsort(-load / shares, kind="stable"):
        previous = _reach(int(giver), movable)
        taker = min(previous, key=lambda task: (load[task] + 0.5) / shares[task])
        # d/dx of the sum: one unit from giver to taker improves it if and only if this holds.
        if (load[giver] - 0.5) / shares[giver] <= (load[taker] + 0.5) / shares[taker] * (1 + 1e-12):
            continue
        path = [taker]
        while path[-1] != giver:
            path.append(previous[path[-1]])
        edges = list(pairwise(reversed(path)))
        even = (load[giver] * shares[taker] - load[taker] * shares[giver]) / (shares[giver] + shares[taker])
        amount = max(1, int(even))
        for source, target in edges:
            room = np.minimum(budget[:, source], limit[:, target] - budget[:, target])
            amount = min(amount, int(room.sum()))
        for source, target in edges:
            room = np.minimum(budget[:, source], limit[:, target] - budget[:, target])
            moved = np.clip(amount - (np.cumsum(room) - room), 0, room)
            budget[:, source] -= moved
            budget[:, target] += moved
        return True
    return False


def _reach(start: int, movable: Bools) -> dict[int, int]:
    """Breadth-first search: task -> its predecessor, for every task that work of `start` can get to."""
    previous = {start: start}
    queue = [start]
    for task in queue:
        for following in np.flatnonzero(movable[task]).tolist():
            if following not in previous:
                previous[following] = task
                queue.append(following)
    return previous


def deal_budgets(group: Ints, budget: Ints, rng: np.random.Generator) -> Codes:
    """Choose each image's tasks so that every signature serves each task exactly as often as its budget says.

    McNaughton's wrap-around rule (1959): a signature's units lie in a row, sorted by task, and the row is cut into
    pieces as long as the signature has images; column i, made of the i-th unit of every piece, is one image's set. No
    task has more units than there are images, so no column meets it twice. Equal columns are spread evenly over the
    signature's images, at random within each even part, so that the tasks advance together in the given order.

    Args:
        group: (N,) signature of each image, in the order in which the images will come.
        budget: (G, T) from `fair_budgets`.
        rng: decides which image of a signature takes which column.

    Returns:
        (N,) the tasks that each image serves.
    """
    tasks = budget.shape[1]
    served = np.zeros(len(group), code_dtype(tasks))
    bits = served.dtype.type(1) << np.arange(tasks, dtype=served.dtype)
    ends = np.cumsum(np.bincount(group, minlength=len(budget)))
    by_group = np.split(np.argsort(group, kind="stable"), ends[:-1])
    for images, units in zip(by_group, budget, strict=True):
        pieces = np.repeat(bits, units).reshape(-1, len(images))
        columns = np.bitwise_or.reduce(pieces, axis=0)
        starts = np.unique(np.append(0, np.cumsum(units)[:-1] % len(images)))
        lengths = np.diff(np.append(starts, len(images)))
        within = np.arange(len(images)) - np.repeat(starts, lengths)
        times = (within + rng.random(len(images))) / np.repeat(lengths, lengths)
        served[images] = columns[np.argsort(times)]
    return served


def rotate_tasks(first: int, count: int, tasks_per_image: int, tasks: int) -> Ints:
    """Serve complete labels in rotation: an image serves m consecutive tasks of a cycle, the next goes on from there.

    Any run of images holds every task equally often, to within one.

    Args:
        first: position of the first image in the stream.
        count: images.
        tasks_per_image: m.
        tasks: T, length of the cycle.

    Returns:
        (count, m) the tasks of each image.
    """
    start = (first % tasks + np.arange(count)) * tasks_per_image
    return np.asarray((start[:, None] + np.arange(tasks_per_image)) % tasks)


def pace_tasks(load: Ints, positions: int) -> Bools:
    """Spread each task's load evenly: at every position, each task is within one unit of its rate.

    This is a fair schedule of T periodic tasks on m processors; the algorithm is PD2 (Srinivasan and Anderson 2002,
    "Optimal rate-based scheduling on multiprocessors"). The j-th unit of a task, from 0, may be served at positions
    floor(j N / load) to ceil((j + 1) N / load) - 1, and the most urgent of those allowed are.

    Args:
        load: (T,) units of each task, at most `positions`; their sum is m * positions, m whole.
        positions: N.

    Returns:
        (N, T) whether the task is served; m distinct tasks at every position.
    """
    per_position = int(load.sum()) // positions
    loads = load.tolist()
    tasks = [task for task, units in enumerate(loads) if units]
    unit = dict.fromkeys(tasks, 0)
    release = dict.fromkeys(tasks, 0)
    urgency = {task: _pd2_urgency(0, loads[task], positions) for task in tasks}
    chosen = np.empty((positions, per_position), np.int64)
    for position in range(positions):
        due = sorted((urgency[task], task) for task in tasks if release[task] <= position)[:per_position]
        for place, (_, task) in enumerate(due):
            chosen[position, place] = task
            unit[task] += 1
            release[task] = unit[task] * positions // loads[task]
            urgency[task] = _pd2_urgency(unit[task], loads[task], positions)
    served = np.zeros((positions, len(load)), np.bool_)
    served[np.arange(positions)[:, None], chosen] = True
    return served


def _pd2_urgency(unit: int, load: int, positions: int) -> tuple[int, bool, int]:
    """Return PD2's priority of a task's next unit; smaller is more urgent.

    Deadlines first; of equal ones, units whose window overlaps that of their successor; of these, the one that starts
    the longest chain of windows without slack (its group deadline, for tasks due at half of all positions or more).
    """
    deadline = _ceil_div((unit + 1) * positions, load)
    overlaps = (unit + 1) * positions % load != 0
    group_deadline = 0
    if positions <= 2 * load < 2 * positions:
        slack = positions - load
        group_deadline = _ceil_div(_ceil_div(deadline * slack, positions) * positions, slack)
    return deadline, not overlaps, -group_deadline


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
