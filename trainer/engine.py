"""DeepSpeed behind one small class: gradient reduction over data and expert parallel ranks, ZeRO 0-2, bf16, clipping.

The only file that imports deepspeed. Mathematics: for any world size, `ep_size` and ZeRO stage a step equals
torch.optim.AdamW on the mean, over ranks and micro-batches, of the losses given to `backward`, after clipping by the
norm of the whole gradient (each expert counted once); in bf16 gradients of micro-batches are also summed in bf16, which
loses about 0.4 % over 8 and 1.3 % over 64 of them. What DeepSpeed 0.19 needs for that is said where it is done.
"""

import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.env import RankEnv
from cluster.groups import Layout
from configs.schema import ParallelConfig, RunConfig
from model.dispatch import ExpertGroup
from trainer.distributed.expert_moves import move_experts
from trainer.distributed.process_groups import ProcessGroups, create_groups, join_world, leave_meeting
from trainer.master_state import LogicalState, MasterState, PartitionedMasterState, ReplicatedMasterState
from trainer.optim import param_groups

# Read when deepspeed is imported: without it a line about the missing GPU goes to the terminal.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.utils import groups as deepspeed_groups

Event = tuple[str, float, int]
"""Name, value and step of a number that a monitor writes."""

_registered: dict[int, ProcessGroups] = {}  # by ep_size, as long as the process group lives


@dataclass(frozen=True)
class StepOutcome:
    """What `Engine.step` did.

    Attributes:
        gradient_norm: L2 norm of the whole gradient before clipping; inf when it was not finite; nan before the last
            micro-batch of a step.
        skipped: the gradient was not finite on some rank: no parameter and no moment has changed.
    """

    gradient_norm: float
    skipped: bool


def init_distributed(env: RankEnv, parallel: ParallelConfig) -> None:
    """Meet the other ranks and create the process groups, all with `parallel.timeout_seconds`.

    Calling it again, also with another `ep_size`, only adds what is missing.

    Raises:
        UserError: `ep_size` does not divide the world, or the ranks could not meet.
    """
    layout = Layout(env.world, parallel.ep_size)
    join_world(env, parallel.timeout_seconds)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed 0.19 still gathers ZeRO partitions with what torch 2.13 has renamed.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    if get_accelerator().device_name() == "cpu":
        # Otherwise every start compiles an operator (a minute; needs a compiler) that training never calls. Elsewhere
        # there is none, and to look at this table is to try what all of DeepSpeed's operators need, with warnings.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    if layout.ep_size in _registered:
        return
    created = create_groups(layout, parallel.timeout_seconds)
    _registered[layout.ep_size] = created
    # DeepSpeed would create these itself, but with torch's default timeout of 30 minutes.
    name = _group_name(layout.ep_size)
    deepspeed_groups._WORLD_GROUP = deepspeed_groups._WORLD_GROUP or created.world
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = created.expert
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(created.expert)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = created.expert_data
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(created.expert_data)


def close_distributed() -> None:
    """Leave the process group and end its threads; does nothing when there is none.

    To be called before the program ends, when no engine is in use any more: a thread of gloo that lets go of its last
    tensor while Python shuts down ends the process by SIGABRT.
    """
    _registered.clear()
    if dist.is_initialized():
        # DeepSpeed knows nothing yet of ranks that have met and agreed to end before anything was built.
        (deepspeed.comm if deepspeed.comm.is_initialized() else dist).destroy_process_group()
    # Connections and threads end with the last reference to their group, and engines refer to themselves. Ranks that
    # wait for this one notice that, before the store is gone that they then ask.
    gc.collect()
    leave_meeting()


def open_monitor(settings: Mapping[str, Any]) -> Callable[[list[Event]], None]:
    """Return what writes events through DeepSpeed's monitor, on rank 0; after `init_distributed`.

    Args:
        settings: the sections tensorboard, csv_monitor and wandb of a DeepSpeed configuration.
    """
    write: Callable[[list[Event]], None] = MonitorMaster(get_monitor_config(settings)).write_events
    return write


def expert_group(layout: Layout) -> ExpertGroup:
    """Return the ranks over which the model shards each expert layer; after `init_distributed`."""
    if layout.ep_size == 1:
        return ExpertGroup()
    rank = layout.expert_rank(dist.get_rank())
    return ExpertGroup(size=layout.ep_size, rank=rank, process_group=_registered[layout.ep_size].expert)


class Engine:
    """Trains `module` on every rank of `layout`; after `init_distributed`.

    The module returns its loss, or a tuple, list or dict that holds it: DeepSpeed prepares its gradient buckets when
    the gradient of an output tensor arrives. On every rank every parameter must take part in every loss.
    """

    def __init__(
        self, module: nn.Module, config: RunConfig, layout: Layout, *, accumulation: int, micro_batch: int
    ) -> None:
        """Move `module` to this rank's device, in place, in `config.train.dtype`.

        Args:
            module: the same on all ranks, but for parameters with `is_expert`: shards of `layout`'s expert groups.
            config: reads `optim`, `train.dtype` and `parallel`.
            layout: ranks and expert groups.
            accumulation: micro-batches per step.
            micro_batch: images per rank and micro-batch.
        """
        self.layout, self.zero_stage = layout, config.parallel.zero_stage
        self._groups, self._clip_norm = _registered[layout.ep_size], config.optim.clip_norm
        self._accumulation, self._micro_batches = accumulation, 0
        self._module = module
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._marker = _mark_experts(module, self._parameters.values(), layout.ep_size)
        self._optimizer = _adamw(module, config, layout.ep_size)
        elements = sum(parameter.numel() for parameter in self._parameters.values())
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module,
            optimizer=self._optimizer,
            config=_deepspeed_config(config, accumulation, micro_batch, elements),
        )
        self.device: torch.device = next(iter(self._parameters.values())).device
        self.dtype: torch.dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
        self._masters = self._master_state()
        self._order_of: dict[str, Tensor] = {}  # parameter -> its expert at each place, where they are not in order
        self._clip_factor = 1.0
        if self.zero_stage == 0:
            self._optimizer.register_step_pre_hook(lambda *_: self._scale_gradients())

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by name."""
        return self._parameters

    @property
    def world_group(self) -> dist.ProcessGroup:
        """All ranks."""
        return self._groups.world

    @property
    def saving_group(self) -> dist.ProcessGroup:
        """All ranks, for one thread beside that which trains."""
        return self._groups.saving

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, an fp32 scalar, divided by ranks * accumulation.

        On the last micro-batch of a step gradients are reduced over the ranks.
        """
        self._micro_batches += 1
        self._engine.set_gradient_accumulation_boundary(self._at_boundary)
        # A loss that is not finite can have a finite gradient. Make it show in the norm, which all ranks share.
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))

    def step(self) -> StepOutcome:
        """Update the parameters after the last micro-batch of a step; before it, do nothing."""
        if not self._at_boundary:
            return StepOutcome(gradient_norm=math.nan, skipped=False)
        self._micro_batches = 0
        if self.zero_stage == 0:
            return self._step_unsharded()
        self._engine.step()
        return StepOutcome(float(self._engine.get_global_grad_norm()), not self._engine.was_step_applied())

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def full_gradients(self) -> dict[str, Tensor]:
        """Return each parameter's mean gradient (fp32, before clipping, all experts of a layer), by parameter name.

        Valid between the last `backward` of a step and `step`. A collective call.
        """
        gradients = {}
        for name, parameter in self._parameters.items():
            gradient = deepspeed.utils.safe_get_full_grad(parameter).detach().float()
            whole = self._all_experts(gradient) if _is_sharded(parameter) else gradient.clone()
            order = self._order_of.get(name)
            gradients[name] = whole if order is None else whole[order.argsort()]
        return gradients

    def logical_state(self) -> LogicalState:
        """Return what a checkpoint holds, free of ranks and stages (see `trainer.master_state`). A collective call."""
        state = self._masters.read(self._parameters, self._groups)
        return move_experts(state, self._order_of, self._groups.expert)

    def load_logical_state(self, state: Mapping[str, Tensor]) -> None:
        """Put `state`, made by any layout's `logical_state`, in place of weights and moments. A collective call."""
        places = {name: order.argsort() for name, order in self._order_of.items()}
        self._masters.write(self._parameters, move_experts(state, places, self._groups.expert))

    def place_experts(self, order_of: Mapping[str, Tensor]) -> None:
        """Move sharded experts, their masters and their moments to other places. A collective call.

        Args:
            order_of: parameter name -> (E,) int64, the expert at each place; those not named lie in order.
        """
        state = self.logical_state()
        self._order_of = dict(order_of)
        self.load_logical_state(state)

    def close(self) -> None:
        """Release DeepSpeed's hooks; the module stays usable."""
        self._engine.destroy()
        if self._marker is not None:
            del self._module._modules[_MARKER_NAME]

    @property
    def _at_boundary(self) -> bool:
        return self._micro_batches == self._accumulation

    def _step_unsharded(self) -> StepOutcome:
        """Step in stage 0, where DeepSpeed would clip sharded experts by a norm that differs between ranks."""
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            for parameter in self._parameters.values():
                parameter.grad = None
            return StepOutcome(gradient_norm=math.inf, skipped=True)
        self._clip_factor = min(1.0, self._clip_norm / (norm + 1e-6)) if self._clip_norm else 1.0
        self._engine.step()
        return StepOutcome(gradient_norm=norm, skipped=False)

    def _gradient_norm(self) -> float:
        """L2 norm of the reduced gradient in stage 0; one sum over the world, so that all ranks see the same bits."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for parameter in self._parameters.values():
            assert parameter.grad is not None, "backward reduces a gradient for every parameter"
            # How many ranks hold this gradient: the sum over the world meets it as often.
            holders = self.layout.world // (self.layout.ep_size if _is_sharded(parameter) else 1)
            squares += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).double().square() / holders
        dist.all_reduce(squares, group=self._groups.world)
        return math.sqrt(squares.item()) if squares.isfinite() else math.inf

    def _scale_gradients(self) -> None:
        """Clip, on the fp32 gradients that AdamW is about to use."""
        if self._clip_factor < 1.0:
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(self._clip_factor)

    def _all_experts(self, shard: Tensor) -> Tensor:
        shards = [torch.empty_like(shard) for _ in range(self.layout.ep_size)]
        dist.all_gather(shards, shard.contiguous(), group=self._groups.expert)
        return torch.cat(shards)

    def _master_state(self) -> MasterState:
        if self.zero_stage:
            return PartitionedMasterState(self._optimizer, self._zero)
        if self.dtype == torch.bfloat16:
            pairs = zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True)
            masters = {p: m for group in pairs for p, m in zip(*group, strict=True)}
        else:
            masters = {p: p for p in self._parameters.values()}
        return ReplicatedMasterState(self._optimizer, masters)


class _ExpertMarker(MoE):  # type: ignore[misc]  # deepspeed carries no types
    """A layer without parameters that tells DeepSpeed to reduce expert gradients over their own groups.

    The engine looks for an instance of its own layer class, and asks it only for `num_experts` (for its log) and to
    create process groups, which exist already.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.num_experts = 0

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing."""


_MARKER_NAME = "_deepspeed_expert_marker"


def _mark_experts(module: nn.Module, parameters: Any, ep_size: int) -> nn.Module | None:
    """Say to DeepSpeed which parameters are shards of experts; with one shard they are ordinary parameters."""
    experts = [parameter for parameter in parameters if getattr(parameter, "is_expert", False)]
    if ep_size == 1 or not experts:
        return None
    for parameter in experts:
        parameter.allreduce, parameter.group_name = False, _group_name(ep_size)
    marker = _ExpertMarker()
    module.add_module(_MARKER_NAME, marker)
    return marker


def _is_sharded(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def _group_name(ep_size: int) -> str:
    return f"ep_size_{ep_size}"


def _adamw(module: nn.Module, config: RunConfig, ep_size: int) -> torch.optim.AdamW:
    """Return AdamW at learning rate 0; DeepSpeed demands a name for each group, for experts that of their ranks."""
    optim = config.optim
    groups = param_groups(module, optim.weight_decay)
    for group in groups:
        group["moe"] = group.pop("expert") and ep_size > 1
        group["name"] = _group_name(ep_size) if group["moe"] else "replicated"
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps)


def _deepspeed_config(config: RunConfig, accumulation: int, micro_batch: int, elements: int) -> dict[str, Any]:
    stage, bucket = config.parallel.zero_stage, min(config.parallel.bucket_elements, elements + elements % 2)
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # Written out: the default is 1. In stage 0 the engine above clips.
        "gradient_clipping": config.optim.clip_norm if stage else 0.0,
        "bf16": {"enabled": config.train.dtype == "bf16", "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,  # without it stage 1 mixes gradients of different experts
            "overlap_comm": config.parallel.overlap_communication,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
