"""One task's squad as a standalone model, exactly.

A squad keeps the task's router rows, embedding and head, and in every expert layer only some experts. Routers keep
their full width: a removed expert stays in the softmax denominator but cannot be chosen. So a token whose K experts
all survive gets the same gates and the same output from that layer as in the large model. An image whose tokens all
do, in every layer, gets the same prediction (tokens meet in attention).

Shape legend: B images, T tasks, E experts, K chosen experts, N patch tokens, S image side.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import ModelConfig
from configs.tasks import TaskSpec, get_task
from model.cost import count_macs, count_parameters
from model.heads import make_head
from model.layer_routing import ExpertLayerInfo
from model.mod_squad import ModSquad
from model.router import Routing
from model.routing_stats import RoutingLedger
from model.vit import ExpertLayer, Kept, VisionTransformer, expert_layers

FORMAT_VERSION = 1


class SquadModel(nn.Module):
    """A model of one task with the experts that the task uses. Needs no process group.

    Attributes:
        config, task, image_size: what it was built from.
        kept: expert layer name -> numbers, in the large model, of the experts it holds.
    """

    def __init__(self, config: ModelConfig, task: TaskSpec, image_size: int, kept: Kept) -> None:
        """Build the model with untrained weights.

        Raises:
            ValueError: `kept` does not name every expert layer, or has too few, unknown or unordered experts.
        """
        super().__init__()
        _check_kept(kept, expert_layers(config))
        self.config, self.task, self.image_size = config, task, image_size
        self.kept = {name: list(experts) for name, experts in kept.items()}
        self.backbone = VisionTransformer(config, num_tasks=1, image_size=image_size, kept=kept)
        self.head = make_head(task, width=config.width, patch_size=config.patch_size, grid=self.backbone.grid)

    def forward(self, images: Tensor) -> Tensor:
        """Return the task's raw prediction, float32: (B, C, S, S), or (B, C) for a vector task.

        Args:
            images: (B, 3, S, S) floating, in [-1, 1].

        Raises:
            ValueError: images of another size.
        """
        pair_image = torch.arange(len(images), device=images.device)
        x_BND, _ = self.backbone(images, pair_image, torch.zeros_like(pair_image))
        prediction: Tensor = self.head(x_BND)
        return prediction

    def spec(self) -> dict[str, Any]:
        """Return JSON-able values from which `from_spec` rebuilds the model without its weights."""
        return {
            "version": FORMAT_VERSION,
            "task": self.task.name,
            "image_size": self.image_size,
            "model": self.config.model_dump(mode="json"),
            "kept": self.kept,
        }

    @classmethod
    def from_spec(cls, spec: Any) -> "SquadModel":
        """Rebuild a model from `spec()`; its weights come from `load_state_dict`.

        Raises:
            UserError: not the description of a squad, or one of another version.
        """
        if not isinstance(spec, Mapping):
            raise UserError("there is no squad description: extract the squad again")
        if spec.get("version") != FORMAT_VERSION:
            raise UserError(f"squad has format version {spec.get('version')}, this program reads {FORMAT_VERSION}")
        try:
            config = ModelConfig.model_validate(spec["model"])
            return cls(config, get_task(spec["task"]), int(spec["image_size"]), spec["kept"])
        except KeyError as error:
            raise UserError(f"squad description lacks {error}: extract the squad again") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"squad description is damaged, extract the squad again: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return what is wrong in one line; pydantic names every fault and explains each over several."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    fault = error.errors(include_url=False)[0]
    return ".".join(map(str, fault["loc"])) + ": " + fault["msg"]


def select_experts(
    ledger: RoutingLedger, task: str, layers: Sequence[ExpertLayerInfo], threshold: float
) -> dict[str, list[int]]:
    """Return, per expert layer, the experts that at least `threshold` of the task's tokens chose; at least K of them.

    Threshold 0 keeps every expert, so the squad equals the large model on any image.

    Args:
        ledger: usage counted on images like those that the squad will see.
        task: name of the task.
        layers: the model's expert layers.
        threshold: share of the task's tokens, in [0, 1].

    Raises:
        UserError: a threshold outside [0, 1], or a ledger without tokens of the task.
    """
    if not 0.0 <= threshold <= 1.0:
        raise UserError(f"threshold {threshold} is not a share of tokens: give a number from 0 to 1")
    kept = {}
    for layer in layers:
        share_E = ledger.share(layer.name, task)
        by_use = share_E.argsort(descending=True, stable=True)
        count = max(layer.top_k, int((share_E >= threshold).sum()))
        kept[layer.name] = sorted(by_use[:count].tolist())
    return kept


def extract_squad(model: ModSquad, task: str, kept: Kept) -> SquadModel:
    """Return the standalone float32 model of one task, with copies of the large model's weights, in eval mode.

    Args:
        model: the large model, holding all its experts (not a shard of an expert-parallel group).
        task: name of one of its tasks.
        kept: experts to keep per expert layer, ascending, at least K each.

    Raises:
        ValueError: an unknown task, wrong `kept`, or a sharded model.
    """
    task_id = _task_id(model, task)
    # Noise acts in training only; its weights would be dead weight here.
    config = model.config.model_copy(update={"router_noise": False})
    squad = SquadModel(config, model.tasks[task_id], model.image_size, kept)

    large = {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    large |= {f"head.{name}": value for name, value in model.heads[task].state_dict().items()}
    experts = {f"backbone.{name}" for name, part in model.backbone.named_parameters() if hasattr(part, "is_expert")}
    state = squad.state_dict()
    for layer in model.expert_layers:
        prefix = f"backbone.{layer.name}."
        for name in (name for name in experts if name.startswith(prefix)):
            if len(large[name]) != layer.num_experts:
                raise ValueError(f"{name} is a shard: build the model with ExpertGroup() to extract from it")
            large[name] = large[name][list(kept[layer.name])]
        if layer.sees_task:
            large[f"{prefix}router.weight"] = large[f"{prefix}router.weight"][task_id : task_id + 1]
        large[f"{prefix}router.kept"] = state[f"{prefix}router.kept"]
    if "backbone.task_embedding" in large:
        large["backbone.task_embedding"] = large["backbone.task_embedding"][task_id : task_id + 1]
    squad.load_state_dict({name: large[name] for name in state})
    return squad.eval()


@dataclass(frozen=True, kw_only=True)
class SquadCost:
    """Size of the large model and of a squad.

    Attributes:
        parameters_before: parameters of the large model with all its tasks.
        parameters_after: parameters of the squad.
        macs_before, macs_after: multiply-accumulates of one image for this task; equal, as K stays.
    """

    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int


def squad_cost(model: ModSquad, squad: SquadModel) -> SquadCost:
    """Return parameters and MACs before and after extraction."""
    return SquadCost(
        parameters_before=count_parameters(model.config, model.tasks, model.image_size).total,
        parameters_after=count_parameters(squad.config, [squad.task], squad.image_size, kept=squad.kept).total,
        macs_before=count_macs(model.config, squad.task, model.image_size),
        macs_after=count_macs(squad.config, squad.task, squad.image_size),
    )


@dataclass(frozen=True, kw_only=True)
class Unaffected:
    """How much of some images a squad treats exactly as the large model does.

    Attributes:
        layers: expert layer name -> share of tokens whose K experts all survive there.
        tokens: share of tokens whose K experts survive in every layer.
        images: share of images all of whose tokens do; their predictions are the same.
    """

    layers: dict[str, float]
    tokens: float
    images: float


@torch.no_grad()
def unaffected_share(model: ModSquad, task: str, kept: Kept, batches: Iterable[Tensor]) -> Unaffected:
    """Measure on images, by the large model's own routing, how much a squad with these experts leaves unchanged.

    Args:
        model: the large model; it runs in eval mode and is put back.
        task: name of one of its tasks.
        kept: experts to keep per expert layer.
        batches: images, each (B, 3, S, S) floating.

    Raises:
        ValueError: an unknown task, or no image at all.
    """
    task_id = _task_id(model, task)
    routes: dict[str, Tensor] = {}
    # Per layer and for all layers together: a flag per token, (B, N) bool.
    survived: dict[str, list[Tensor]] = {layer.name: [] for layer in model.expert_layers}
    everywhere: list[Tensor] = []
    was_training = model.training
    model.eval()
    hooks = [
        part.router.register_forward_hook(_record_into(routes, part.info.name))
        for part in model.backbone.modules()
        if isinstance(part, ExpertLayer)
    ]
    try:
        for images in batches:
            pair_image = torch.arange(len(images), device=images.device)
            model(images, pair_image, torch.full_like(pair_image, task_id))
            for name, experts_SK in routes.items():
                alive_S = torch.isin(experts_SK, torch.tensor(kept[name], device=experts_SK.device)).all(-1)
                survived[name].append(alive_S.view(len(images), model.backbone.grid**2).cpu())
            everywhere.append(torch.stack([flags[-1] for flags in survived.values()]).all(0))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    if not sum(len(flags) for flags in everywhere):
        raise ValueError("no image to measure the unaffected share on")
    tokens_BN = torch.cat(everywhere)
    return Unaffected(
        layers={name: float(torch.cat(flags).double().mean()) for name, flags in survived.items()},
        tokens=float(tokens_BN.double().mean()),
        images=float(tokens_BN.all(1).double().mean()),
    )


def _record_into(routes: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Routing], None]:
    """Return a forward hook for a router that writes its choices to `routes[name]`."""

    def record(_router: nn.Module, _inputs: Any, routing: Routing) -> None:
        routes[name] = routing.experts_SK

    return record


def _task_id(model: ModSquad, task: str) -> int:
    names = [spec.name for spec in model.tasks]
    if task not in names:
        raise ValueError(f"the model has no task '{task}': it has {', '.join(names)}")
    return names.index(task)


def _check_kept(kept: Kept, layers: Sequence[ExpertLayerInfo]) -> None:
    if set(kept) != {layer.name for layer in layers}:
        raise ValueError(f"kept names the layers {sorted(kept)}, the model has {[layer.name for layer in layers]}")
    for layer in layers:
        experts = list(kept[layer.name])
        if experts != sorted(set(experts)) or not set(experts) <= set(range(layer.num_experts)):
            raise ValueError(f"kept['{layer.name}'] = {experts}: name ascending experts below {layer.num_experts}")
        if len(experts) < layer.top_k:
            raise ValueError(f"kept['{layer.name}'] holds {len(experts)} experts, a token needs {layer.top_k}")
