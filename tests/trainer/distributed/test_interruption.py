"""Signals: noted, agreed between ranks, handlers put back."""

import os
import signal

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks
from trainer.distributed.interruption import Interrupted, StopSignals


def _signal_one_rank(rank: int, world: int) -> list[int]:
    assert dist.group.WORLD is not None
    with StopSignals() as signals:
        before = signals.agreed(dist.group.WORLD)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        after = signals.agreed(dist.group.WORLD)
    return [before, after]


def test_a_signal_to_one_rank_stops_all_at_the_same_boundary() -> None:
    assert run_ranks(_signal_one_rank, 2) == [[0, signal.SIGTERM]] * 2


def test_handlers_come_back_and_a_second_ctrl_c_acts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # what a launcher sends to ranks that are stopping already
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR2, 140)])
def test_exit_status_is_that_of_a_shell(number: int, status: int) -> None:
    assert Interrupted(number, step=3).exit_status == status
