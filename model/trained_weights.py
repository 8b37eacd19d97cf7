"""Weights of a trained Mod-Squad as the start of another one, with the same tasks, new ones or fewer.

What all tasks share is copied by name. What belongs to a task (its row of every router and of the task embedding, its
head) is copied where both models have a task of that name; tasks that are new keep what a new model gives them. All
depends on the weights alone, whatever shard of the experts a rank holds.

Shape legend: T tasks, G patches along a side, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import ModelConfig
from model.mod_squad import ModSquad
from model.vit import ExpertLayer

# What may differ: how the model was described, how it began, and noise in training only.
_FREE = {"preset", "init", "router_noise", "head_width"}
_POSITION, _TASK_EMBEDDING, _HEADS = "backbone.position", "backbone.task_embedding", "heads."


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What `start_from_trained` did.

    Attributes:
        taken, new, unused: tasks of both models, of the new one alone, of the trained one alone; in their order.
        grids: patches along a side of the trained and of the new model; positions are resampled where they differ.
    """

    taken: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    grids: tuple[int, int]


@torch.no_grad()
def start_from_trained(model: ModSquad, trained: ModSquad, source: str) -> Taken:
    """Overwrite a freshly built model's weights with those of `trained`.

    Args:
        model: on the CPU in float32; may hold a shard of the experts.
        trained: whole, on the CPU.
        source: names the latter in errors.

    Raises:
        UserError: the models differ in more than their tasks and image size; names what to set.
    """
    _check_fits(model.config, trained.config, source)
    ours, theirs = ([spec.name for spec in each.tasks] for each in (model, trained))
    rows = [(ours.index(name), theirs.index(name)) for name in ours if name in theirs]
    weights = trained.state_dict()
    by_task, shards = _parts(model)
    for name, parameter in model.named_parameters():
        if name.startswith(_HEADS) and name.split(".")[1] not in theirs:
            continue
        if name not in weights:
            assert name.endswith("noise_weight"), "all else follows from what was compared"
            continue
        value = weights[name]
        if name == _POSITION:
            value = _resampled(value, trained.backbone.grid, model.backbone.grid)
        if name in by_task:
            for our_row, their_row in rows:
                parameter[our_row] = value[their_row]
        else:
            _copy(parameter, value[shards[name]] if name in shards else value, name, source)
    return Taken(
        taken=tuple(name for name in ours if name in theirs),
        new=tuple(name for name in ours if name not in theirs),
        unused=tuple(name for name in theirs if name not in ours),
        grids=(trained.backbone.grid, model.backbone.grid),
    )


def _check_fits(ours: ModelConfig, theirs: ModelConfig, source: str) -> None:
    compared = [name for name in type(ours).model_fields if name not in _FREE]
    for name, attribute in [*zip(compared, compared, strict=True), ("head_width", "attention_head_width")]:
        wanted, found = getattr(theirs, attribute), getattr(ours, attribute)
        if wanted != found:
            raise UserError(f"{source} has model.{name} {wanted}, the new model {found}: set model.{name}={wanted}")


def _parts(model: ModSquad) -> tuple[set[str], dict[str, list[int]]]:
    """Return the names of parameters with a row per task, and for shards of experts the global numbers of the rows."""
    by_task, shards = {_TASK_EMBEDDING}, {}
    for prefix, layer in model.named_modules():
        if isinstance(layer, ExpertLayer):
            if layer.info.sees_task and model.config.routers == "task":
                by_task |= {f"{prefix}.router.{name}" for name, _ in layer.router.named_parameters()}
            for name, parameter in layer.experts.named_parameters():
                if getattr(parameter, "is_expert", False):
                    shards[f"{prefix}.experts.{name}"] = list(layer.experts.layout.owned)
    return by_task, shards


def _resampled(position: Tensor, theirs: int, ours: int) -> Tensor:
    """(G * G, D) of one grid -> that of another."""
    if theirs == ours:
        return position
    position_1DGG = position.T.reshape(1, -1, theirs, theirs)
    resampled = F.interpolate(position_1DGG, (ours, ours), mode="bicubic", antialias=True)
    return resampled[0].flatten(1).T


def _copy(parameter: nn.Parameter, value: Tensor, name: str, source: str) -> None:
    if parameter.shape != value.shape:
        raise UserError(
            f"{source}: {name} has shape {tuple(value.shape)}, the new model's has {tuple(parameter.shape)}: the task "
            "is another one under the same name"
        )
    parameter.copy_(value)
