"""Trains the real model on any layout, and in plain PyTorch, with routing as it comes or forced to the extreme."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cluster.env import RankEnv
from cluster.groups import Layout
from cluster.placement import LayerPlaces
from configs.schema import RunConfig
from data_pipeline.planning.dealing import TaskHomes
from model.dispatch import ExpertGroup
from model.mod_squad import ModSquad
from model.router import Routing
from model.vit import ExpertLayer
from tests.trainer.squad_model import SIZES, SquadLoss, squad_batches
from tests.trainer.toy_model import toy_config
from trainer.distributed.affine_placement import AffinePlacement, apply_placement
from trainer.engine import Engine, expert_group, init_distributed
from trainer.optim import param_groups

STEPS, SAMPLES, LEARNING_RATE, CLIP_NORM = 20, 16, 3e-3, 0.01
EXPERTS = SIZES.mlp_experts

RoutingKind = Literal["one_expert", "idle_expert", "few_tasks"]


@dataclass(frozen=True)
class Run:
    """One training. All factors but `world`, `ep_size` and `stage` also change what plain PyTorch computes.

    routing: one_expert: every token goes to expert 0 alone; idle_expert: no token ever chooses the last one; few_tasks:
    as it comes, and each of four ranks has pairs of two of the three tasks only.
    """

    world: int
    ep_size: int
    stage: int
    dtype: str
    accumulation: int
    clips: bool
    routing: RoutingKind
    noise: bool = False
    """The routers' noise is on."""
    moves: bool = False
    """Before the steps 0, 7 and 13 all experts move to other places, and others are shadowed."""

    @property
    def config(self) -> RunConfig:
        return toy_config(
            optim={"clip_norm": CLIP_NORM if self.clips else 0.0},
            parallel={"ep_size": self.ep_size, "zero_stage": self.stage},
            train={"dtype": self.dtype},
        )

    def model(self, group: ExpertGroup, world: dist.ProcessGroup | None) -> SquadLoss:
        top_k = 1 if self.routing == "one_expert" else SIZES.mlp_top_k
        changes = {"attention_top_k": top_k, "mlp_top_k": top_k, "router_noise": self.noise}
        sizes = SIZES.model_copy(update=changes)
        loss = SquadLoss(group, world, sizes)
        if (force := _FORCED.get(self.routing)) is not None:
            for part in loss.modules():
                if isinstance(part, ExpertLayer):
                    part.router.register_forward_hook(lambda _module, _x, routing: force(routing))
        return loss

    def parts(self, step: int, world: int) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
        """Pass by pass, rank by rank: images, the two tasks of each, and the turns of the images."""
        images, tasks = squad_batches(STEPS, SAMPLES)[step]
        turns = torch.tensor([(sample, step) for sample in range(SAMPLES)])
        order = torch.arange(SAMPLES)
        if self.routing != "few_tasks":  # every part alike
            order = order.view(4, 4).T.flatten()
        parts = (whole[order].chunk(world * self.accumulation) for whole in (images, tasks, turns))
        chunks = list(zip(*parts, strict=True))
        return [chunks[first : first + world] for first in range(0, len(chunks), world)]


def _to_expert_0(routing: Routing) -> Routing:
    chosen = torch.zeros_like(routing.experts_SK)
    return Routing(routing.probs_SE, routing.probs_SE.gather(1, chosen), chosen, routing.logits_SE)


def _not_to_the_last(routing: Routing) -> Routing:
    chosen = routing.logits_SE[:, :-1].detach().topk(routing.experts_SK.shape[1]).indices
    return Routing(routing.probs_SE, routing.probs_SE.gather(1, chosen), chosen, routing.logits_SE)


_FORCED: dict[str, Callable[[Routing], Routing]] = {"one_expert": _to_expert_0, "idle_expert": _not_to_the_last}


def train_on_ranks(rank: int, world: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [_train_on_rank(rank, world, run) for run in runs]


def _train_on_rank(rank: int, world: int, run: Run) -> dict[str, Any]:
    init_distributed(RankEnv(rank=rank, world=world, local_rank=rank), run.config.parallel)
    layout = Layout(world, run.ep_size)
    model = run.model(expert_group(layout), dist.group.WORLD)
    micro_batch = SAMPLES // world // run.accumulation
    engine = Engine(model, run.config, layout, accumulation=run.accumulation, micro_batch=micro_batch)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        if run.moves and step in (0, 7, 13):
            _move_experts(model.model, engine, seed=step)
        engine.set_learning_rate(LEARNING_RATE)
        loss_sum = torch.zeros(())
        for turn, parts in enumerate(run.parts(step, world), start=1):
            loss, _ = engine(*parts[rank])
            engine.backward(loss)
            loss_sum += loss.detach() / (run.accumulation * world)
            if step == 0 and turn == run.accumulation:
                gradients = engine.full_gradients()
            outcome = engine.step()
        dist.all_reduce(loss_sum)
        losses.append(loss_sum.item())
        norms.append(outcome.gradient_norm)
        assert not outcome.skipped
    state = _whole_state(engine)
    engine.close()
    return {"losses": losses, "norms": norms, "gradients": gradients, "state": state}


def _whole_state(engine: Engine) -> dict[str, Tensor]:
    state = engine.logical_state()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def _move_experts(model: ModSquad, engine: Engine, seed: int) -> None:
    """To random places, some of them shadowed; the state, in the experts' own order, does not notice."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for number, layer in enumerate(model.expert_layers):
        order = torch.randperm(layer.num_experts, generator=generator).tolist()
        layers[layer.name] = LayerPlaces(order=tuple(order), shadowed=tuple(sorted(order[: (seed + number) % 4])))
    before = _whole_state(engine)
    places = TaskHomes(engine.layout.ep_size, tuple(range(len(model.tasks))))
    apply_placement(AffinePlacement(homes=places, layers=layers), model, engine)
    after = _whole_state(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


def train_plainly(run: Run) -> dict[str, Any]:
    """One process, torch.optim.AdamW on fp32 masters, no DeepSpeed, no exchange.

    In bf16 the model and the gradient of each pass are bf16, their sum over passes, the masters and the moments fp32.
    """
    model = run.model(ExpertGroup(), None)
    masters = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    flags = {name: getattr(parameter, "is_expert", False) for name, parameter in model.named_parameters()}
    model.to(torch.bfloat16 if run.dtype == "bf16" else torch.float32)
    optim = run.config.optim
    adamw = torch.optim.AdamW(
        _groups(model, masters, optim.weight_decay), lr=LEARNING_RATE, betas=optim.betas, eps=optim.eps
    )
    assert flags.keys() == masters.keys()
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        adamw.zero_grad(set_to_none=False)
        total = 0.0
        for (part,) in run.parts(step, 1):
            model.zero_grad()
            loss, _ = model(*part)
            (loss / run.accumulation).backward()
            total += loss.item() / run.accumulation
            for name, parameter in model.named_parameters():
                grad = parameter.grad.float()
                masters[name].grad = grad if masters[name].grad is None else masters[name].grad + grad
        gradients = gradients or {name: master.grad.clone() for name, master in masters.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(masters.values(), CLIP_NORM if run.clips else math.inf).item())
        adamw.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        losses.append(total)
    state: dict[str, Tensor] = {"step": torch.tensor(float(STEPS))}
    for name, master in masters.items():
        state[f"master.{name}"] = master.detach()
        state |= {f"{moment}.{name}": adamw.state[master][moment] for moment in ("exp_avg", "exp_avg_sq")}
    return {"losses": losses, "norms": norms, "gradients": gradients, "state": state}


def _groups(model: nn.Module, masters: dict[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups, with masters in place of parameters."""
    master_of = {parameter: masters[name] for name, parameter in model.named_parameters()}
    return [
        {"params": [master_of[parameter] for parameter in group["params"]], "weight_decay": group["weight_decay"]}
        for group in param_groups(model, weight_decay)
    ]


FACTORS: dict[str, tuple[Any, ...]] = {
    "layout": ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)),
    "routing": ("one_expert", "idle_expert", "few_tasks"),
    "stage": (0, 1, 2),
    "dtype": ("fp32", "bf16"),
    "accumulation": (1, 2),
    "clips": (False, True),
    "noise": (False, True),
}


def covering_runs(strength: int) -> list[Run]:
    """Few runs in which every combination of values of any `strength` factors occurs (a greedy covering array)."""
    names = list(FACTORS)
    chosen = list(itertools.combinations(range(len(names)), strength))
    rows = list(itertools.product(*FACTORS.values()))
    open_cells = {(columns, tuple(row[c] for c in columns)) for row in rows for columns in chosen}
    picked = []
    while open_cells:
        best = max(
            rows, key=lambda row: sum((columns, tuple(row[c] for c in columns)) in open_cells for columns in chosen)
        )
        open_cells -= {(columns, tuple(best[c] for c in columns)) for columns in chosen}
        picked.append(best)
    return [Run(*layout, *others) for layout, others in _ordered(picked)]


def _ordered(rows: Sequence[tuple[Any, ...]]) -> list[tuple[tuple[int, int], tuple[Any, ...]]]:
    return [
        (layout, (stage, dtype, accumulation, clips, routing, noise))
        for layout, routing, stage, dtype, accumulation, clips, noise in rows
    ]
