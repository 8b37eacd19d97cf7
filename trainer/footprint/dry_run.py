"""`modsquad train --dry-run`: builds a whole run and takes its worst step, so that what would fail later fails now.

In the worst step every token chooses the same experts, which lie together on as few ranks as possible; if any may be
shadowed, as many others are. Nothing is written: the run folder stays as it is, and the learning rate is zero.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cluster.env import RankEnv
from cluster.groups import Layout, accumulation_steps, check_experts
from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.cursor import Cursor
from data_pipeline.loader import TrainLoader
from data_pipeline.targets import prepare_batch
from model.mod_squad import ModSquad
from model.router import Routing
from model.vit import ExpertLayer, expert_layers
from trainer.assembly import Assembly, assemble
from trainer.distributed.agreement import on_all, on_each
from trainer.distributed.rank_process import load_on_all, run_to_the_end
from trainer.engine import init_distributed
from trainer.footprint.memory import available_bytes, peak_bytes
from trainer.footprint.plan import GIB, memory_per_rank, most_shadowed
from trainer.recipes import load_recipe

STEPS = 2  # the first one also prepares kernels and buffers


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What the worst step took.

    Attributes:
        step_seconds: the second step, on the slowest rank.
        pairs: of the rank with most, in one forward pass.
        peak_bytes: of the rank with most: on a GPU what torch reserved, on a CPU the whole process.
        planned_bytes: what `trainer.footprint.plan` says of the rank with the busiest experts, without libraries.
        available_bytes: of the rank with least, before the model was built.
    """

    step_seconds: float
    pairs: int
    peak_bytes: int
    planned_bytes: float
    available_bytes: int

    def __str__(self) -> str:
        return (
            f"worst step: {self.step_seconds:.2f} s, {self.pairs} pairs per rank and pass; peak "
            f"{self.peak_bytes / GIB:.2f} GiB of {self.available_bytes / GIB:.2f} GiB per rank (planned: "
            f"{self.planned_bytes / GIB:.2f} GiB and libraries)"
        )


def dry_run_rank(config: str, env: RankEnv, *, overrides: Sequence[str] = (), debug: bool = False) -> int:
    """Take the worst step on this rank and return the exit status; arguments as in `trainer.entry.train_rank`."""

    def action() -> None:
        found = dry_run(load_on_all(lambda: load_recipe(config, overrides), env), env)
        if env.is_main:
            print(found)

    return run_to_the_end(action, env, debug=debug)


def dry_run(config: RunConfig, env: RankEnv) -> DryRun:
    """Build everything and take the worst step; every rank of the world calls this together.

    Raises:
        UserError: the configuration does not fit the world or the shards, or the step does not fit the memory.
    """
    init_distributed(env, config.parallel)
    world = dist.group.WORLD
    assert world is not None, "init_distributed has made it"
    own = available_bytes() // _ranks_here(world)
    available = min(on_all(world, lambda: own))
    planned = _planned_bytes(config, env)
    if planned > available:
        raise UserError(
            f"a step with all tokens at the same experts takes about {planned / GIB:.2f} GiB per rank, and "
            f"{available / GIB:.2f} GiB are available: lower train.micro_batch, set "
            "train.activation_checkpointing=recompute, or see what fits with modsquad plan"
        )
    parts = assemble(config, env)
    try:
        shadowed = most_shadowed(config, config.parallel.ep_size)
        with all_tokens_to_the_same_experts(parts.model), last_experts_shadowed(parts.model, shadowed):
            seconds, pairs = _take_steps(config, env, parts)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"rank {env.rank} ran out of GPU memory in a step with all tokens at the same experts: lower "
            f"train.micro_batch or set train.activation_checkpointing=recompute ({str(error).splitlines()[0]})"
        ) from error
    finally:
        parts.engine.close()
    measured = on_all(world, lambda: (seconds, pairs, peak_bytes()))
    return DryRun(
        step_seconds=max(rank[0] for rank in measured),
        pairs=max(rank[1] for rank in measured),
        peak_bytes=max(rank[2] for rank in measured),
        planned_bytes=planned,
        available_bytes=available,
    )


@contextmanager
def all_tokens_to_the_same_experts(model: ModSquad) -> Iterator[None]:
    """Let every router choose the first K experts for every token."""

    def force(_router: torch.nn.Module, _inputs: object, routing: Routing) -> Routing:
        tokens, top_k = routing.experts_SK.shape
        chosen = torch.arange(top_k, device=routing.experts_SK.device).expand(tokens, -1).contiguous()
        return Routing(routing.probs_SE, routing.probs_SE.gather(1, chosen), chosen, routing.logits_SE)

    routers = [part.router for part in model.modules() if isinstance(part, ExpertLayer)]
    hooks = [router.register_forward_hook(force) for router in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def last_experts_shadowed(model: ModSquad, shadowed: int) -> Iterator[None]:
    """Shadow the last experts of every layer, up to so many, but none of the first K."""
    experts = [part.experts for part in model.modules() if isinstance(part, ExpertLayer)]
    before = [part.layout for part in experts]
    for part, layout in zip(experts, before, strict=True) if shadowed else ():
        order = range(layout.num_experts)
        part.layout = layout.placed(order, order[part.top_k :][-shadowed:], next(part.parameters()).device)
    try:
        yield
    finally:
        for part, layout in zip(experts, before, strict=True):
            part.layout = layout


def _take_steps(config: RunConfig, env: RankEnv, parts: Assembly) -> tuple[float, int]:
    """Return seconds of the last step, and most pairs of a forward pass."""
    loader = TrainLoader(
        parts.train_index,
        config.data,
        parts.tasks,
        images_per_step=config.train.images_per_step,
        micro_batch=parts.micro_batch,
        rank=env.rank,
        world=env.world,
        seed=config.seed,
        cursor=Cursor.start(parts.train_index, config.seed),
        steps=STEPS,
    )
    batches, engine, pairs, seconds = iter(loader), parts.engine, 0, 0.0
    engine.set_learning_rate(0.0)
    try:
        for _ in range(STEPS):
            started = time.perf_counter()
            for _ in range(parts.accumulation):
                batch = on_each(engine.world_group, lambda: next(batches))
                prepared = prepare_batch(batch.to(engine.device), parts.tasks, config.data.image_size)
                loss, _ = engine(prepared, float(env.world * parts.accumulation))
                engine.backward(loss)
                outcome = engine.step()
                pairs = max(pairs, len(prepared.pair_task))
            assert outcome.skipped or outcome.gradient_norm >= 0  # a number on the host: the device is done
            seconds = time.perf_counter() - started
    finally:
        loader.close()
    return seconds, pairs


def _planned_bytes(config: RunConfig, env: RankEnv) -> float:
    """Return the memory of the rank whose experts serve the whole expert group."""
    parallel = config.parallel
    layout = Layout(env.world, parallel.ep_size)
    check_experts(config.model, parallel.ep_size)
    micro_batch, _ = accumulation_steps(config.train.images_per_step, config.train.micro_batch, env.world)
    loads = [
        parallel.ep_size * min(layer.top_k, layer.num_experts // parallel.ep_size) / layer.top_k
        for layer in expert_layers(config.model)
    ]
    return memory_per_rank(config, layout, parallel.zero_stage, micro_batch, load=max(loads, default=1.0)).total


def _ranks_here(world: dist.ProcessGroup) -> int:
    """Return how many ranks share this rank's memory: those of its machine, or on GPUs itself alone."""
    machines = on_all(world, lambda: os.uname().nodename)
    return 1 if torch.cuda.is_available() else machines.count(os.uname().nodename)
