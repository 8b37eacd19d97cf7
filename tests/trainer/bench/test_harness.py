"""The harness on a clock that only the measured runs move."""

from collections.abc import Callable

import pytest

from trainer.bench.harness import Quartiles, interleave, quartiles


class FakeMachine:
    """Alternatives that take the seconds they are told, one after the other, and note what they ran on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[tuple[str, int]] = []

    def clock(self) -> float:
        return self.now

    def alternative(self, name: str, *seconds: float) -> Callable[[int], None]:
        times = iter(seconds)

        def run(given: int) -> None:
            self.ran.append((name, given))
            self.now += 1000.0 if given < 0 else next(times)  # a run without the clock would show at once

        return run

    def draw(self, number: int) -> int:
        self.now += 100.0  # drawing is not counted either
        return number


def test_ratio_is_to_the_reference_runs_just_before_and_after() -> None:
    machine = FakeMachine()
    reference, candidates = interleave(
        machine.alternative("dense", 1.0, 3.0, 5.0, 3.0),
        {"ours": machine.alternative("ours", 4.0, 16.0, 2.0)},
        machine.draw,
        rounds=3,
        clock=machine.clock,
    )
    assert candidates["ours"].ratio == quartiles([4 / 2, 16 / 4, 2 / 4])
    assert candidates["ours"].milliseconds.median == 4000.0
    assert candidates["ours"].runs == 3
    assert reference.milliseconds == quartiles([1000.0, 3000.0, 5000.0, 3000.0])
    assert reference.ratio == Quartiles(low=1.0, median=1.0, high=1.0)


def test_every_timed_run_follows_one_of_the_same_alternative() -> None:
    machine = FakeMachine()
    candidates = {name: machine.alternative(name, 1.0, 1.0) for name in ("a", "b")}
    interleave(machine.alternative("r", *[1.0] * 5), candidates, machine.draw, rounds=2, clock=machine.clock)
    timed = [number for number, (_, given) in enumerate(machine.ran) if given >= 0]
    assert [machine.ran[number] for number in timed] == [
        ("r", 0), ("a", 0), ("r", 0), ("b", 0), ("r", 0), ("a", 1), ("r", 1), ("b", 1), ("r", 1),
    ]  # fmt: skip
    assert all(machine.ran[number - 1] == (machine.ran[number][0], -1) for number in timed)


def test_a_reference_may_stand_alone() -> None:
    machine = FakeMachine()
    reference, candidates = interleave(machine.alternative("r", 2.0), {}, machine.draw, rounds=1, clock=machine.clock)
    assert (reference.milliseconds.median, candidates) == (2000.0, {})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], (3.0, 3.0, 3.0)),
        ([1.0, 3.0], (1.5, 2.0, 2.5)),
        ([5.0, 1.0, 2.0, 4.0, 3.0], (2.0, 3.0, 4.0)),
    ],
)
def test_quartiles(values: list[float], expected: tuple[float, float, float]) -> None:
    assert quartiles(values) == Quartiles(low=expected[0], median=expected[1], high=expected[2])
