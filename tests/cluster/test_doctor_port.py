"""The port where ranks meet: free and reached by all, or why not."""

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.doctor import Finding
from cluster.doctor_port import check_port
from cluster.env import RankEnv, free_port


def check(ranks: Sequence[int], world: int, *, seconds: float = 30.0) -> list[tuple[bool, list[Finding]]]:
    port = free_port()

    def one(rank: int) -> tuple[bool, list[Finding]]:
        time.sleep(0.2 * (rank == 0))  # the others try again until it listens
        return check_port(RankEnv(rank=rank, world=world, master_port=port), seconds=seconds)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_all_ranks_reach_a_free_port_and_the_first_says_so() -> None:
    (met, told), *others = check([0, 1, 2], 3)
    assert met
    (finding,) = told
    assert finding.verdict == "good"
    assert finding.found.endswith("is free, and all 3 ranks reach it")
    assert others == [(True, [])] * 2


def test_a_rank_that_does_not_come_is_counted() -> None:
    (met, told), other = check([0, 1], 3, seconds=1.5)
    assert not met
    (finding,) = told
    assert finding.verdict == "bad"
    assert "1 of 2 other ranks reached" in finding.found
    assert "20000 to 29999" in finding.advice
    assert other == (False, []), "it reached the port, and knows that they cannot meet"


@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1", "nobody listens there"), ("no-such-host.invalid", "the name does not resolve")],
)
def test_a_rank_that_does_not_reach_the_port_says_why(address: str, reason: str) -> None:
    env = RankEnv(rank=1, world=2, master_addr=address, master_port=free_port())
    met, told = check_port(env, seconds=0.5)
    assert not met
    (finding,) = told
    assert finding.verdict == "bad"
    assert finding.found.startswith(f"rank 1 on {socket.gethostname()} does not reach rank 0 at {address}:")
    assert reason in finding.found


def test_a_place_that_does_not_answer_is_told_from_one_that_refuses() -> None:
    # Linux drops what comes for a listener whose queue is full, as a firewall does.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        queued = [socket.socket() for _ in range(3)]
        for connection in queued:
            connection.setblocking(False)
            connection.connect_ex(full.getsockname())
        met, told = check_port(RankEnv(rank=1, world=2, master_port=full.getsockname()[1]), seconds=1.0)
        for connection in queued:
            connection.close()
    assert not met
    assert "no answer, as behind a firewall" in told[0].found
