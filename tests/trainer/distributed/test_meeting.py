"""The place where ranks meet: who is missing, who speaks, who is lost; nobody waits for a store that is gone."""

import socket
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


def test_ranks_that_do_not_notice_a_loss_are_the_lost_ones() -> None:
    ranks = meetings(3, 3)
    assert at_once([rank.silent_ranks for rank in (ranks[0], ranks[2])]) == [[1], [1]]
    started = time.monotonic()
    at_once([rank.leave for rank in (ranks[0], ranks[2])])
    assert time.monotonic() - started < 10, "nobody waits for the lost one"


def test_a_store_that_is_gone_or_stopped_is_asked_once() -> None:
    ranks = meetings(2, 2)
    ranks[1].store = mock.Mock(**{"add.side_effect": lambda *_: time.sleep(2)})
    with mock.patch("trainer.distributed.meeting._ANSWER_SECONDS", 0.2):
        assert ranks[1].silent_ranks() is None
        assert ranks[1].first_to("speak")
        ranks[1].leave()
    assert ranks[1].store.add.call_count == 1
    at_once([ranks[0].leave])


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
