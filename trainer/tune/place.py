"""Where the trials of `modsquad tune` run: how many ranks, on GPUs or not, and what each of them has."""

from dataclasses import dataclass

import torch

from cluster.cpu import usable_cores
from configs.launch import LaunchConfig
from trainer.footprint.memory import available_bytes
from trainer.footprint.plan import GIB, RESERVED_GIB


@dataclass(frozen=True, kw_only=True)
class Place:
    """The ranks of a trial.

    Attributes:
        ranks: how many.
        gpus: whether each has a GPU.
        cores_per_rank: CPU cores of each.
        memory_bytes: for weights, gradients, optimizer and activations of each; None: not known.
    """

    ranks: int
    gpus: bool
    cores_per_rank: int
    memory_bytes: float | None


def this_machine(ranks: int | None, memory_gib: float | None) -> Place:
    """Return `ranks` processes of this machine (None: one per GPU, or one), with its memory unless it is given."""
    gpus = torch.cuda.is_available()
    number = ranks or (torch.cuda.device_count() if gpus else 1)
    if memory_gib is None:
        whole = torch.cuda.get_device_properties(0).total_memory if gpus else available_bytes() / number
        memory_gib = whole / GIB
    return Place(
        ranks=number,
        gpus=gpus,
        cores_per_rank=max(1, usable_cores() // number),
        memory_bytes=_usable(memory_gib, gpus),
    )


def slurm_job(launch: LaunchConfig, memory_gib: float | None) -> Place:
    """Return the ranks of a job; their memory is known where it is given, or is asked for on CPUs."""
    gpus = launch.gpus_per_node > 0
    if memory_gib is None and launch.mem_gb is not None and not gpus:
        memory_gib = launch.mem_gb / launch.ranks
    return Place(
        ranks=launch.nodes * launch.ranks,
        gpus=gpus,
        cores_per_rank=launch.cpus_per_rank,
        memory_bytes=None if memory_gib is None else _usable(memory_gib, gpus),
    )


def _usable(memory_gib: float, gpus: bool) -> float:
    return (memory_gib - (RESERVED_GIB if gpus else 0.0)) * GIB
