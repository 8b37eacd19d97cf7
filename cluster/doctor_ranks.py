"""What several ranks find out together: do they see each other, the same files, the same time, and how fast are they?

Runs on every rank, under srun or as `python -m cluster.doctor_ranks` with the variables of `cluster.env`. Rank 0 prints
one JSON object per finding, and so does each rank that cannot reach it.
"""

import json
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.doctor import Finding
from cluster.doctor_port import check_port
from cluster.env import RankEnv, choose_gpu, detect
from cluster.places import gather_places, ranks_on_one_gpu

_TIMEOUT = timedelta(seconds=120)
_MESSAGE_BYTES = 16 * 2**20  # of each rank to all others, in all
_REPEATS = 5
_MOST_SKEW_SECONDS = 1.0


@dataclass(frozen=True)
class RankFacts:
    """What one rank says of itself.

    Attributes:
        rank, node: who and where.
        versions: of the libraries that must agree.
        token: content of the file that the asking side has written; None where it is not visible.
        clock: its time, read right after a barrier.
    """

    rank: int
    node: str
    versions: tuple[str, ...]
    token: str | None
    clock: float


def main(token_file: Path, token: str) -> None:
    """Meet, exchange, and print what was found."""
    env = detect()
    can_meet, told = check_port(env) if env.world > 1 else (True, [])
    _print(told)
    if not can_meet:
        sys.exit(1)
    device = _join(env)
    facts = _exchange_facts(env, token_file)
    bandwidth = _measure_all_to_all(device)
    if env.is_main:
        _print([*judge(facts, token, token_file), _bandwidth_finding(bandwidth, facts, device)])
    dist.barrier()
    dist.destroy_process_group()


def judge(facts: Sequence[RankFacts], token: str, token_file: Path) -> Iterator[Finding]:
    """Yield what the ranks' facts mean.

    Args:
        facts: of all ranks.
        token: what `token_file` holds on the asking side.
        token_file: a file in the folder that all ranks should see.
    """
    nodes = Counter(fact.node for fact in facts)
    yield Finding("ranks", "good", f"{len(facts)} met on {', '.join(f'{node} ({n})' for node, n in nodes.items())}")

    blind = sorted({fact.node for fact in facts if fact.token != token})
    if blind:
        yield Finding(
            "shared folder",
            "bad",
            f"{token_file.parent} is not the same on {', '.join(blind)}",
            "put run_dir and data on a file system that every node mounts under the same path",
        )
    else:
        yield Finding("shared folder", "good", f"{token_file.parent} is the same everywhere")

    middle = statistics.median(fact.clock for fact in facts)
    worst = max(facts, key=lambda fact: abs(fact.clock - middle))
    skew = worst.clock - middle
    if abs(skew) > _MOST_SKEW_SECONDS:
        yield Finding(
            "clocks",
            "warning",
            f"{worst.node} is {skew:+.1f} s away",
            "let chrony or ntpd set the clocks; times in logs lie",
        )
    else:
        yield Finding("clocks", "good", f"within {abs(skew) * 1e3:.0f} ms")

    first = facts[0]
    others = [fact for fact in facts if fact.versions != first.versions]
    if others:
        yield Finding(
            "versions",
            "bad",
            f"rank {others[0].rank} on {others[0].node} has {', '.join(others[0].versions)}; rank 0 has "
            f"{', '.join(first.versions)}",
            "use one environment on all nodes",
        )
    else:
        yield Finding("versions", "good", f"{', '.join(first.versions)} everywhere")


def _print(findings: Sequence[Finding]) -> None:
    for finding in findings:
        print(json.dumps(asdict(finding)), flush=True)


def _join(env: RankEnv) -> torch.device:
    """Join the world, which talks by gloo; return this rank's GPU if every rank has one of its own, else the CPU."""
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{env.master_addr}:{env.master_port}",
        rank=env.rank,
        world_size=env.world,
        timeout=_TIMEOUT,
    )
    visible = torch.cuda.device_count()
    gpu = choose_gpu(env.local_rank, visible) if visible == 1 or env.local_rank < visible else None
    places = gather_places(gpu)
    if gpu is None or any(place.gpu is None for place in places) or ranks_on_one_gpu(places):
        return torch.device("cpu")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def _exchange_facts(env: RankEnv, token_file: Path) -> list[RankFacts]:
    try:
        token = token_file.read_text(encoding="utf-8")
    except OSError:
        token = None
    versions = tuple(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    python = f"python {'.'.join(map(str, sys.version_info[:2]))}"
    dist.barrier()
    mine = RankFacts(env.rank, socket.gethostname(), (python, *versions), token, time.time())
    found: list[Any] = [None] * env.world
    dist.all_gather_object(found, mine)
    return found


def _measure_all_to_all(device: torch.device) -> float | None:
    """Return bytes per second that each rank sends to the others, median of some repeats; None for one rank alone."""
    world = dist.get_world_size()
    if world == 1:
        return None
    group = dist.new_group(backend="nccl", timeout=_TIMEOUT) if device.type == "cuda" else dist.group.WORLD
    sent = torch.zeros(world * (_MESSAGE_BYTES // world), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    seconds = []
    for _ in range(_REPEATS + 1):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_to_all_single(received, sent, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    slowest = torch.tensor(statistics.median(seconds[1:]), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return sent.numel() * (world - 1) / world / float(slowest)


def _bandwidth_finding(bandwidth: float | None, facts: Sequence[RankFacts], device: torch.device) -> Finding:
    if bandwidth is None:
        return Finding("all-to-all", "good", "one rank alone exchanges nothing")
    backend = "NCCL" if device.type == "cuda" else "gloo"
    found = f"{bandwidth / 1e9:.2f} GB/s sent by each of {len(facts)} ranks ({backend})"
    if device.type == "cuda" and bandwidth < 1e9:
        return Finding(
            "all-to-all",
            "warning",
            found,
            "slower than Ethernet: set NCCL_SOCKET_IFNAME, look for InfiniBand (NCCL_DEBUG=INFO)",
        )
    return Finding("all-to-all", "good", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
