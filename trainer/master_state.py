"""Master weights and AdamW moments as whole tensors, wherever the ZeRO stage keeps them.

A logical state has, in fp32 on the CPU, for each parameter NAME the tensors `master.NAME`, `exp_avg.NAME` and
`exp_avg_sq.NAME` in the parameter's shape, and `step`, the scalar number of updates. Shards of experts are DTensors
over their first dimension, whose whole is all experts. Nothing in it depends on world size, ZeRO stage or dtype.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainer.distributed.process_groups import ProcessGroups

LogicalState = dict[str, Tensor]

_MASTER, _MOMENTS = "master", ("exp_avg", "exp_avg_sq")


class MasterState(ABC):
    """Reads and writes logical states; subclasses know where the numbers are."""

    def __init__(self, optimizer: torch.optim.AdamW) -> None:
        """Give `optimizer` the moments of step 0, which AdamW creates only in its first step."""
        self._optimizer = optimizer
        # Dropping what is there undoes the step on zeros with which DeepSpeed warms up in stage 0 and bf16.
        optimizer.state.clear()
        for group in optimizer.param_groups:
            for held in group["params"]:
                moments = {moment: torch.zeros_like(held, requires_grad=False) for moment in _MOMENTS}
                optimizer.state[held] = {"step": torch.zeros(()), **moments}

    def read(self, parameters: Mapping[str, nn.Parameter], groups: ProcessGroups) -> LogicalState:
        """Return a copy of all masters and moments, of this rank's experts only. A collective call."""
        state: LogicalState = {"step": next(iter(self._optimizer.state.values()))["step"].clone()}
        mesh = _expert_mesh(groups)
        for name, parameter in parameters.items():
            for part in (_MASTER, *_MOMENTS):
                value = self._get(parameter, part).detach().to("cpu", copy=True)
                if getattr(parameter, "is_expert", False) and groups.layout.ep_size > 1:
                    value = DTensor.from_local(value, mesh, [Replicate(), Shard(0)], run_check=False)
                state[f"{part}.{name}"] = value
        return state

    @torch.no_grad()
    def write(self, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
        """Replace all masters and moments, and the model's weights with them. A collective call."""
        for name, parameter in parameters.items():
            for part in (_MASTER, *_MOMENTS):
                value = state[f"{part}.{name}"]
                local = value.to_local() if isinstance(value, DTensor) else value
                self._set(parameter, part, local.to(parameter.device))
        for moments in self._optimizer.state.values():
            moments["step"].copy_(state["step"])
        self._refresh_model()

    @abstractmethod
    def _get(self, parameter: nn.Parameter, part: str) -> Tensor:
        """Return one part in fp32, in the shape of `parameter`."""

    @abstractmethod
    def _set(self, parameter: nn.Parameter, part: str, value: Tensor) -> None:
        """Replace what this rank keeps of one part."""

    @abstractmethod
    def _refresh_model(self) -> None:
        """Copy masters to the model."""


class ReplicatedMasterState(MasterState):
    """Stage 0: every rank keeps whole masters; in fp32 they are the parameters themselves."""

    def __init__(self, optimizer: torch.optim.AdamW, masters: Mapping[nn.Parameter, Tensor]) -> None:
        """Take the master of each parameter."""
        super().__init__(optimizer)
        self._masters = masters

    def _get(self, parameter: nn.Parameter, part: str) -> Tensor:
        master = self._masters[parameter]
        value: Tensor = master if part == _MASTER else self._optimizer.state[master][part]
        return value

    def _set(self, parameter: nn.Parameter, part: str, value: Tensor) -> None:
        self._get(parameter, part).copy_(value)

    def _refresh_model(self) -> None:
        for parameter, master in self._masters.items():
            parameter.copy_(master)


class PartitionedMasterState(MasterState):
    """ZeRO 1 and 2: each rank keeps one piece of the flat concatenation of every group of parameters.

    DeepSpeed gives each parameter methods that assemble it (zeros elsewhere, then a sum over the ranks: exact) and
    that replace the piece that is here.
    """

    def __init__(self, optimizer: torch.optim.AdamW, zero: Any) -> None:
        """Take AdamW over the pieces, and DeepSpeed's ZeRO optimizer around it."""
        super().__init__(optimizer)
        self._zero = zero
        zero._lazy_init_hp_params_optimizer_state()  # lets those methods see the moments before the first step

    def _get(self, parameter: Any, part: str) -> Tensor:
        value: Tensor = parameter.get_full_hp_param(None if part == _MASTER else part)
        return value

    def _set(self, parameter: Any, part: str, value: Tensor) -> None:
        parameter.set_full_hp_param(value, None if part == _MASTER else part)

    def _refresh_model(self) -> None:
        self._zero.update_lp_params()


def _expert_mesh(groups: ProcessGroups) -> DeviceMesh:
    """Lay the ranks out as (expert_data, expert), over the groups that exist."""
    ranks = torch.arange(groups.layout.world).view(-1, groups.layout.ep_size)
    return DeviceMesh.from_group(
        [groups.expert_data, groups.expert], "cpu", mesh=ranks, mesh_dim_names=("expert_data", "expert")
    )
