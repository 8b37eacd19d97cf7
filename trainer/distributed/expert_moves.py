"""Moves rows of sharded tensors between the ranks that share them: experts to other places, or back in order."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.master_state import LogicalState


def move_experts(state: Mapping[str, Tensor], targets: Mapping[str, Tensor], group: dist.ProcessGroup) -> LogicalState:
    """Return `state` with the rows of every named parameter's tensors at other places. A collective call.

    Args:
        state: "PART.NAME" -> tensor, as in `trainer.master_state`; shards are DTensors.
        targets: NAME -> (E,) int64, the place to which the row at each place goes; the same on every rank.
        group: the ranks over which rows are sharded.
    """
    moved = dict(state)
    for name, value in state.items():
        target = targets.get(name.partition(".")[2])
        if target is not None and isinstance(value, DTensor):
            local = move_rows(value.to_local(), target, group)
            moved[name] = DTensor.from_local(local, value.device_mesh, value.placements, run_check=False)
    return moved


def move_rows(local: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's rows after all have moved; each row travels once.

    Args:
        local: (E / R, ...) on the CPU; rank r holds the places [r * E / R, (r + 1) * E / R).
        target: (E,) int64, the new place of the row at each place.
        group: its R ranks.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    target_RL = target.cpu().view(ranks, -1)
    owner_RL = target_RL // target_RL.shape[1]
    sent, received = _counts(owner_RL[rank], ranks), [int((owners == rank).sum()) for owners in owner_RL]
    arrived = torch.empty_like(local)
    leaving = local[owner_RL[rank].argsort(stable=True)].contiguous()
    dist.all_to_all_single(arrived, leaving, received, sent, group=group)
    # Rows arrive rank by rank, from each in the order of their old places.
    places = target_RL[owner_RL == rank] - rank * target_RL.shape[1]
    return torch.empty_like(local).index_copy_(0, places, arrived)


def _counts(owner_L: Tensor, ranks: int) -> list[int]:
    return [int(count) for count in torch.bincount(owner_L, minlength=ranks)]
