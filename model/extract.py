"""Some tasks' squad as a standalone model, exactly.

A squad keeps its tasks' router rows, embeddings and heads, and in every expert layer only some experts. Routers keep
their full width: a removed expert stays in the softmax denominator but cannot be chosen. So a token whose K experts
all survive gets the same gates and the same output from that layer as in the large model. An image whose tokens all
do, in every layer, gets the same prediction (tokens meet in attention).

A squad of several tasks holds, per layer, the union of what each of them needs, and the tokens of every task choose
among the whole union. That keeps the promise above: a token's K best experts of all E are its K best of any set that
holds them, whoever asked for the others. An expert that only another task asked for can but save a choice that would
otherwise be lost. Hiding it would cost a mask per task and make fewer tokens exact.

Shape legend: B images, T tasks, E experts, N patch tokens, D width, S image side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import ModelConfig
from configs.task_definitions import DEFINITIONS_KEY, defined_in, definitions_of
from configs.tasks import TaskSpec, resolve_tasks
from model.cost import count_image_macs, count_parameters
from model.heads import make_head
from model.layer_routing import ExpertLayerInfo
from model.mod_squad import ModSquad
from model.routing_stats import RoutingLedger
from model.vit import Kept, VisionTransformer, expert_layers

FORMAT_VERSION = 2


class SquadModel(nn.Module):
    """A model of some tasks with the experts that they use. Needs no process group.

    Attributes:
        config, tasks, image_size: what it was built from.
        kept: expert layer name -> numbers, in the large model, of the experts it holds.
    """

    tasks: tuple[TaskSpec, ...]

    def __init__(self, config: ModelConfig, tasks: Sequence[TaskSpec], image_size: int, kept: Kept) -> None:
        """Build the model with untrained weights.

        Raises:
            ValueError: no task or one named twice; `kept` does not name every expert layer, or has too few, unknown or
                unordered experts.
        """
        super().__init__()
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a squad needs one task or several different ones, not {names}")
        _check_kept(kept, expert_layers(config))
        self.config, self.tasks, self.image_size = config, tuple(tasks), image_size
        self.kept = {name: list(experts) for name, experts in kept.items()}
        self.backbone = VisionTransformer(config, num_tasks=len(names), image_size=image_size, kept=kept)
        self.heads = nn.ModuleDict(
            {
                task.name: make_head(task, width=config.width, patch_size=config.patch_size, grid=self.backbone.grid)
                for task in tasks
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return every task's name -> its raw prediction, float32: (B, C, S, S), or (B, C) for a vector task.

        Args:
            images: (B, 3, S, S) floating, in [-1, 1].

        Raises:
            ValueError: images of another size.
        """
        B, T = len(images), len(self.tasks)
        pair_image = torch.arange(B, device=images.device).repeat(T)
        pair_task = torch.arange(T, device=images.device).repeat_interleave(B)
        x_PND, _ = self.backbone(images, pair_image, pair_task)
        x_TBND = x_PND.unflatten(0, (T, B))
        return {name: head(x_BND) for (name, head), x_BND in zip(self.heads.items(), x_TBND.unbind(), strict=True)}

    def spec(self) -> dict[str, Any]:
        """Return JSON-able values from which `from_spec` rebuilds the model without its weights."""
        definitions = definitions_of(self.tasks)
        return {
            "version": FORMAT_VERSION,
            DEFINITIONS_KEY: {name: definition.model_dump(mode="json") for name, definition in definitions.items()},
            "tasks": [task.name for task in self.tasks],
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
            tasks = resolve_tasks(spec["tasks"], defined_in(spec, "squad description"))
            return cls(config, tasks, int(spec["image_size"]), spec["kept"])
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
    ledger: RoutingLedger, tasks: Sequence[str], layers: Sequence[ExpertLayerInfo], threshold: float
) -> dict[str, list[int]]:
    """Return the experts to keep per expert layer: those that at least `threshold` of the tokens of some task chose,
    and at least the K that each task uses most.

    Threshold 0 keeps every expert, so the squad equals the large model on any image. A higher threshold never keeps
    more.

    Args:
        ledger: usage counted on images like those that the squad will see.
        tasks: names of the tasks that leave together.
        layers: the model's expert layers.
        threshold: share of a task's tokens, in [0, 1].

    Raises:
        UserError: a threshold outside [0, 1], or a ledger without tokens of a task.
    """
    if not 0.0 <= threshold <= 1.0:
        raise UserError(f"threshold {threshold} is not a share of tokens: give a number from 0 to 1")
    kept = {}
    for layer in layers:
        union: set[int] = set()
        for task in tasks:
            share_E = ledger.share(layer.name, task)
            by_use = share_E.argsort(descending=True, stable=True)
            count = max(layer.top_k, int((share_E >= threshold).sum()))
            union.update(by_use[:count].tolist())
        kept[layer.name] = sorted(union)
    return kept


def extract_squad(model: ModSquad, tasks: Sequence[str], kept: Kept) -> SquadModel:
    """Return the standalone float32 model of some tasks, with copies of the large model's weights, in eval mode.

    Args:
        model: the large model, holding all its experts (not a shard of an expert-parallel group).
        tasks: names of some of its tasks, in any order; the squad's predictions have that order.
        kept: experts to keep per expert layer, ascending, at least K each.

    Raises:
        ValueError: an unknown task, no task or one twice, wrong `kept`, or a sharded model.
    """
    ids = task_ids(model, tasks)
    # Noise acts in training only; its weights would be dead weight here.
    config = model.config.model_copy(update={"router_noise": False})
    squad = SquadModel(config, [model.tasks[task] for task in ids], model.image_size, kept)

    large = model.state_dict()
    experts = {name for name, part in model.named_parameters() if hasattr(part, "is_expert")}
    state = squad.state_dict()
    for layer in model.expert_layers:
        prefix = f"backbone.{layer.name}."
        for name in (name for name in experts if name.startswith(prefix)):
            if len(large[name]) != layer.num_experts:
                raise ValueError(f"{name} is a shard: build the model with ExpertGroup() to extract from it")
            large[name] = large[name][list(kept[layer.name])]
        # One row: a router that sees no task, or serves all of them.
        if len(large[f"{prefix}router.weight"]) > 1:
            large[f"{prefix}router.weight"] = large[f"{prefix}router.weight"][ids]
        large[f"{prefix}router.kept"] = state[f"{prefix}router.kept"]
    if "backbone.task_embedding" in large:
        large["backbone.task_embedding"] = large["backbone.task_embedding"][ids]
    squad.load_state_dict({name: large[name] for name in state})
    return squad.eval()


def task_ids(model: ModSquad, tasks: Sequence[str]) -> list[int]:
    """Return the numbers of the named tasks in the large model.

    Raises:
        ValueError: an unknown task.
    """
    names = [spec.name for spec in model.tasks]
    if unknown := [task for task in tasks if task not in names]:
        raise ValueError(f"the model has no task '{unknown[0]}': it has {', '.join(names)}")
    return [names.index(task) for task in tasks]


@dataclass(frozen=True, kw_only=True)
class SquadCost:
    """Size of the large model and of a squad.

    Attributes:
        parameters_before: parameters of the large model with all its tasks.
        parameters_after: parameters of the squad.
        macs_before, macs_after: multiply-accumulates of one image for the squad's tasks; equal, as K stays.
    """

    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int


def squad_cost(model: ModSquad, squad: SquadModel) -> SquadCost:
    """Return parameters and MACs before and after extraction."""
    return SquadCost(
        parameters_before=count_parameters(model.config, model.tasks, model.image_size).total,
        parameters_after=count_parameters(squad.config, squad.tasks, squad.image_size, kept=squad.kept).total,
        macs_before=count_image_macs(model.config, squad.tasks, model.image_size),
        macs_after=count_image_macs(squad.config, squad.tasks, squad.image_size),
    )


def _check_kept(kept: Kept, layers: Sequence[ExpertLayerInfo]) -> None:
    if set(kept) != {layer.name for layer in layers}:
        raise ValueError(f"kept names the layers {sorted(kept)}, the model has {[layer.name for layer in layers]}")
    for layer in layers:
        experts = list(kept[layer.name])
        if experts != sorted(set(experts)) or not set(experts) <= set(range(layer.num_experts)):
            raise ValueError(f"kept['{layer.name}'] = {experts}: name ascending experts below {layer.num_experts}")
        if len(experts) < layer.top_k:
            raise ValueError(f"kept['{layer.name}'] holds {len(experts)} experts, a token needs {layer.top_k}")
