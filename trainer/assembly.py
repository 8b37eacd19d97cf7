"""What a training run consists of on one rank, built from its configuration: data, model, objective, engine."""

from dataclasses import dataclass

import torch.distributed as dist

from cluster.env import RankEnv
from cluster.groups import Layout, accumulation_steps, check_experts
from configs.schema import RunConfig
from configs.tasks import TaskSpec
from data_pipeline.index import ShardIndex
from data_pipeline.run_shards import open_shards
from model.dispatch import TrafficMeter
from model.matching import Matching
from model.mod_squad import ModSquad
from trainer.activation_checkpointing import checkpoint_blocks
from trainer.distributed.agreement import on_each
from trainer.engine import Engine, expert_group
from trainer.initial_weights import start_from_file
from trainer.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts of a run on one rank.

    Attributes:
        tasks: the run's tasks; their order defines task numbers.
        train_index, val_index: the shards.
        model: holds this rank's shards of experts.
        matching: the matching loss, with its running mean.
        objective: model, losses and matching as one module.
        engine: trains `objective`.
        traffic: counts the bytes that tokens bring to experts of other ranks and back.
        micro_batch: images per rank and forward pass.
        accumulation: forward passes per step.
        start_note: for the user: which file the weights start from; None: random, or those of a checkpoint.
    """

    tasks: tuple[TaskSpec, ...]
    train_index: ShardIndex
    val_index: ShardIndex
    model: ModSquad
    matching: Matching
    objective: Objective
    engine: Engine
    traffic: TrafficMeter
    micro_batch: int
    accumulation: int
    start_note: str | None


def assemble(config: RunConfig, env: RankEnv) -> Assembly:
    """Build everything that a run needs; after `init_distributed`, every rank of the world calls this together.

    Raises:
        UserError: the configuration does not fit the world, the shards or the file of initial weights.
    """
    layout = Layout(env.world, config.parallel.ep_size)
    check_experts(config.model, config.parallel.ep_size)
    micro_batch, accumulation = accumulation_steps(config.train.images_per_step, config.train.micro_batch, env.world)
    assert dist.group.WORLD is not None, "init_distributed has made it"
    train_index, val_index = on_each(
        dist.group.WORLD, lambda: (open_shards(config, "train"), open_shards(config, "val"))
    )
    tasks = config.task_specs
    group = expert_group(layout)
    model = ModSquad(config.model, tasks, config.data.image_size, seed=config.seed, group=group)
    start_note = start_from_file(model, config, dist.group.WORLD)
    checkpoint_blocks(model, config.train.activation_checkpointing)
    prior = [config.matching.task_prior.get(spec.name, 1.0) for spec in tasks]
    matching = Matching(config.matching, model.expert_layers, len(tasks), prior=prior)
    objective = Objective(model, matching, config, tasks)
    return Assembly(
        tasks=tasks,
        train_index=train_index,
        val_index=val_index,
        model=model,
        matching=matching,
        objective=objective,
        engine=Engine(objective, config, layout, accumulation=accumulation, micro_batch=micro_batch),
        traffic=group.meter,
        micro_batch=micro_batch,
        accumulation=accumulation,
        start_note=start_note,
    )
