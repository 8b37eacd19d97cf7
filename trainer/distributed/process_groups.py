"""The process groups of a run: the world, the ranks that share experts, the ranks that hold the same experts.

All are created here, with one timeout, so that no collective can hang for longer than the configuration allows.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from cluster.env import RankEnv, choose_gpu
from cluster.groups import Layout
from cluster.places import gather_places, ranks_on_one_gpu, threads_of
from configs.errors import UserError
from trainer.distributed.meeting import Meeting


@dataclass(frozen=True, kw_only=True)
class ProcessGroups:
    """The groups that one rank belongs to.

    Attributes:
        world: all ranks.
        expert: the `layout.ep_size` consecutive ranks over which each expert layer is sharded.
        expert_data: the ranks, one of each expert group, that hold the same experts.
        saving: all ranks, for checkpoints that are written while the other groups are in use.
    """

    layout: Layout
    world: dist.ProcessGroup
    saving: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup


_meeting: list[Meeting] = []  # of this process, while it is one of several ranks


def join_world(env: RankEnv, timeout_seconds: float) -> None:
    """Meet the other ranks; does nothing when that has happened. A single process needs no port.

    CUDA tensors travel by NCCL, those on the CPU (checkpoints, agreements) by gloo.

    Raises:
        UserError: the other ranks did not come in time, rank 0 cannot be reached, or two ranks have the same GPU.
    """
    backend, variables, gpu = "gloo", env.variables(), None
    if torch.cuda.is_available():
        gpu = choose_gpu(env.local_rank, torch.cuda.device_count())
        torch.cuda.set_device(gpu)
        variables["LOCAL_RANK"] = str(gpu)  # by which DeepSpeed chooses
        backend = "cpu:gloo,cuda:nccl"
    os.environ.update(variables)
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=timeout_seconds)
    if env.world == 1:
        alone = dist.HashStore()  # type: ignore[attr-defined]  # public, but left out of the type stubs' exports
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
        return
    meeting = Meeting(env, timeout_seconds)
    _meeting.append(meeting)
    meeting.wait_for_all()
    store = dist.PrefixStore("world", meeting.store)  # type: ignore[attr-defined]  # likewise
    try:
        dist.init_process_group(backend, store=store, rank=env.rank, world_size=env.world, timeout=timeout)
    except RuntimeError as error:  # gloo's own, for an interface that does not exist
        raise UserError(
            f"rank {env.rank} of {env.world} could not connect to the others: {str(error).splitlines()[0]}"
        ) from error
    places = gather_places(gpu)
    if shared := ranks_on_one_gpu(places):
        raise UserError(
            f"ranks {shared[0]} and {shared[1]} have the same GPU of {places[shared[0]].machine}: start one rank per "
            "GPU, or let each see its own (CUDA_VISIBLE_DEVICES)"
        )
    if "OMP_NUM_THREADS" not in os.environ:  # neither launcher nor user has seen to it
        torch.set_num_threads(threads_of(env.rank, places))


def current_meeting() -> Meeting | None:
    """Return where this rank has met the others; None for one process, and before that."""
    return _meeting[-1] if _meeting else None


def leave_meeting() -> None:
    """Let go of the place where the ranks met, after the process groups; does nothing when there is none."""
    while _meeting:
        _meeting.pop().leave()


def create_groups(layout: Layout, timeout_seconds: float) -> ProcessGroups:
    """Create the groups of `layout`; every rank of the world calls this together."""
    timeout = timedelta(seconds=timeout_seconds)
    return ProcessGroups(
        layout=layout,
        world=_own_group([list(range(layout.world))], timeout),
        saving=_own_group([list(range(layout.world))], timeout, backend="gloo"),
        expert=_own_group(layout.expert_groups(), timeout),
        expert_data=_own_group(layout.expert_data_groups(), timeout),
    )


def _own_group(ranks_of_groups: list[list[int]], timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup:
    """Create one group for each list of ranks and return the one that holds this rank."""
    groups = [dist.new_group(ranks, timeout=timeout, backend=backend) for ranks in ranks_of_groups]
    own: dist.ProcessGroup = next(group for group in groups if group is not dist.GroupMember.NON_GROUP_MEMBER)
    return own
