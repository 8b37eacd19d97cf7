"""The place where ranks meet: who is missing, who speaks, who is lost; nobody waits for a store that is gone."""

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

from cluster.env import RankEnv, free_port
from configs.errors import UserError
from trainer.distributed.meeting import Meeting


def meetings(world: int, present: int, timeout_seconds: float = 20.0) -> list[Meeting]:
    """Let the first `present` of `world` ranks, all in this process, find the store."""
    port = free_port()
    envs = [RankEnv(rank=rank, world=world, local_rank=rank, master_port=port) for rank in range(present)]
    return [Meeting(env, timeout_seconds) for env in envs]


def at_once(calls: list[object]) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))  # type: ignore[operator]


def test_all_meet_and_one_speaks() -> None:
    ranks = meetings(3, 3)
    at_once([rank.wait_for_all for rank in ranks])
    assert sum(rank.first_to("speak") for rank in ranks) == 1
    assert ranks[2].first_to("say something else")
    started = time.monotonic()
    at_once([rank.leave for rank in ranks])
    assert time.monotonic() - started < 10


def test_those_that_do_not_come_are_named() -> None:
    ranks = meetings(4, 2, timeout_seconds=2.0)

    def message(rank: Meeting) -> str:
        with pytest.raises(UserError) as caught:
            rank.wait_for_all()
        return str(caught.value)

    messages = at_once([lambda rank=rank: message(rank) for rank in ranks])
    assert len(set(messages)) == 1
    assert "ranks 2, 3 of 4 did not come" in str(messages[0])


def test_ranks_that_do_not_answer_are_the_lost_ones() -> None:
    ranks = meetings(4, 4)
    at_once([rank.wait_for_all for rank in ranks])
    ranks[1].leave()  # from now on nobody answers for it
    assert at_once([rank.missing_ranks for rank in (ranks[0], ranks[2])]) == [[1], [1]], (
        "rank 3 has not noticed, but answers"
    )
    assert ranks[2].first_to("speak")
    assert not ranks[0].first_to("speak")
    assert ranks[3].missing_ranks() == [1], "it notices later"
    assert not ranks[3].first_to("speak")
    at_once([rank.leave for rank in (ranks[0], ranks[2], ranks[3])])


def test_where_all_answer_those_that_do_not_notice_hang() -> None:
    ranks = meetings(3, 3)
    at_once([rank.wait_for_all for rank in ranks])
    assert at_once([rank.missing_ranks for rank in (ranks[0], ranks[2])]) == [[1], [1]]
    at_once([rank.leave for rank in ranks])


HOST = """
import sys, time
from cluster.env import RankEnv
from trainer.distributed.meeting import Meeting
host = Meeting(RankEnv(rank=0, world=4, master_port=int(sys.argv[1])), 60.0)
host.wait_for_all()
print("met", flush=True)
time.sleep(60)
"""


@mock.patch("trainer.distributed.meeting._LINGER_AFTER_LOSS_SECONDS", 60.0)
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_without_the_first_store_the_second_tells_who_is_lost_and_who_has_spoken(end: signal.Signals) -> None:
    port = free_port()
    host = subprocess.Popen([sys.executable, "-c", HOST, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        ranks = [Meeting(RankEnv(rank=rank, world=4, local_rank=rank, master_port=port), 60.0) for rank in (1, 2, 3)]
        at_once([rank.wait_for_all for rank in ranks])
        assert host.stdout is not None
        assert host.stdout.readline() == "met\n"
        assert ranks[0].first_to("say something before")
        host.send_signal(end)
        with mock.patch("trainer.distributed.meeting._ANSWER_SECONDS", 0.5):
            assert at_once([rank.missing_ranks for rank in ranks]) == [[0]] * 3
            assert sum(at_once([lambda rank=rank: rank.first_to("speak") for rank in ranks])) == 1  # type: ignore[arg-type]
            assert not ranks[1].first_to("say something before")
            started = time.monotonic()
            at_once([rank.leave for rank in ranks])
            assert time.monotonic() - started < 30, "nobody waits for the lost one"
    finally:
        host.kill()
        host.wait()


def test_without_any_store_all_speak() -> None:
    with mock.patch("trainer.distributed.meeting._answer", return_value=None):
        ranks = meetings(2, 2)
        assert [rank.missing_ranks() for rank in ranks] == [None, None]
        assert all(rank.first_to("speak") for rank in ranks)
        at_once([rank.leave for rank in ranks])


def test_a_place_that_cannot_be_reached_is_named() -> None:
    env = RankEnv(rank=1, world=2, local_rank=1, master_port=free_port())
    with pytest.raises(UserError, match=rf"rank 1 of 2 found nobody at 127\.0\.0\.1:{env.master_port} within 1 s"):
        Meeting(env, 1.0)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"rank 0 cannot listen at 127.0.0.1:{port}: set MASTER_PORT"):
            Meeting(RankEnv(world=2, master_port=port), 1.0)
