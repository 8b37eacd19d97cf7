"""Timing of alternatives side by side in one process, so that what else the machine does cancels out of the ratios.

Every timed run of a candidate stands between two of the reference; its ratio is its time over their mean. Before each
timed run the same alternative runs once without the clock: the heap and the caches are then as after itself, as in a
long training, and not as another alternative has left them. Median and quartiles over rounds are reported.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Input = TypeVar("Input")


@dataclass(frozen=True, kw_only=True)
class Quartiles:
    """The middle of some measurements and its spread."""

    low: float
    median: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One alternative's time per run, and its ratio to the runs of the reference around it (1 for the reference)."""

    milliseconds: Quartiles
    ratio: Quartiles
    runs: int


def clock_for(threads: int) -> Callable[[], float]:
    """Return the clock, in seconds, that suits a number of threads.

    With one thread, the process' CPU time, which other processes do not lengthen by taking the core; it adds up over
    threads, so that with more of them only wall time says how long one waits.
    """
    return time.process_time if threads == 1 else time.perf_counter


def interleave(
    reference: Callable[[Input], object],
    candidates: Mapping[str, Callable[[Input], object]],
    draw: Callable[[int], Input],
    *,
    rounds: int,
    clock: Callable[[], float],
) -> tuple[Timing, dict[str, Timing]]:
    """Time all alternatives in turns: reference, then in every round candidate, reference, next candidate, reference...

    Args:
        reference: what the candidates are compared with.
        candidates: name -> alternative; may be empty.
        draw: number of the round -> the input of its timed runs; its time is not counted. The runs without the clock
            get that of round -1.
        rounds: at least 1.
        clock: seconds from any start.

    Returns:
        The reference's timing, and each candidate's.
    """
    settling = draw(-1)

    def seconds_of(run: Callable[[Input], object], given: Input) -> float:
        run(settling)
        begin = clock()
        run(given)
        return clock() - begin

    for run in (reference, *candidates.values()):
        run(settling)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    references = [seconds_of(reference, draw(0))]
    for number in range(rounds):
        given = draw(number)
        for name, run in candidates.items():
            seconds[name].append(seconds_of(run, given))
            references.append(seconds_of(reference, given))
            ratios[name].append(2 * seconds[name][-1] / (references[-2] + references[-1]))
    return _timing(references, [1.0]), {name: _timing(seconds[name], ratios[name]) for name in candidates}


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return median and quartiles, interpolated between measurements; of one value, that value."""
    if len(values) == 1:
        return Quartiles(low=values[0], median=values[0], high=values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(low=low, median=median, high=high)


def _timing(seconds: Sequence[float], ratios: Sequence[float]) -> Timing:
    return Timing(
        milliseconds=quartiles([1e3 * value for value in seconds]), ratio=quartiles(ratios), runs=len(seconds)
    )
