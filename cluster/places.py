"""Where the ranks run: their machines, cores and GPUs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cluster.cpu import fair_threads, usable_core_numbers


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        machine: its name.
        cores: those that the rank may use.
        gpu: UUID of the rank's GPU, None without one.
    """

    machine: str
    cores: set[int]
    gpu: str | None = None


def gather_places(gpu: int | None) -> list[Place]:
    """Return the places of all ranks, in order. A collective call, on the CPU.

    Args:
        gpu: number of this rank's GPU among the visible ones, None without one.
    """
    uuid = None if gpu is None else str(torch.cuda.get_device_properties(gpu).uuid)
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, Place(os.uname().nodename, usable_core_numbers(), uuid))
    return places


def ranks_on_one_gpu(places: Sequence[Place]) -> tuple[int, int] | None:
    """Return the first two ranks that have the same GPU, if any: NCCL does not connect them."""
    owners: dict[str, int] = {}
    for rank, place in enumerate(places):
        if place.gpu is not None and (owner := owners.setdefault(place.gpu, rank)) != rank:
            return owner, rank
    return None


def threads_of(rank: int, places: Sequence[Place]) -> int:
    """Return how many threads a rank may run so that the ranks of its machine do not compete for cores."""
    own = places[rank]
    return fair_threads(own.cores, [place.cores for place in places if place.machine == own.machine])
