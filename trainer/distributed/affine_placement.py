"""Task-affine placement of a run: from its routing ledger to places of experts and homes of tasks (cluster.placement).

A function of ledger and layout alone, so that a run that resumes from a checkpoint finds the placement that it had
chosen there. Statistics, checkpoints, squads and reports count experts by their own numbers and know nothing of it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.placement import LayerPlaces, LayerUse, expected_bytes, place
from configs.schema import ModelConfig, RunConfig
from data_pipeline.planning.dealing import TaskHomes
from model.cost import count_expert_parameters
from model.layer_routing import ExpertLayerInfo
from model.mod_squad import ModSquad
from model.routing_stats import RoutingLedger
from model.vit import ExpertLayer
from trainer.engine import Engine
from trainer.footprint.plan import pairs_per_image

_PARAMETER_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class AffinePlacement:
    """Where experts and tasks live.

    Attributes:
        homes: how a global batch is dealt.
        layers: layer name -> where its experts are.
    """

    homes: TaskHomes
    layers: dict[str, LayerPlaces]

    def describe(self, before: "AffinePlacement | None") -> str:
        """Return for the user how many experts change their rank, from `before` or from experts in order."""
        moved = total = shadowed = 0
        for name, places in self.layers.items():
            local = len(places.order) // self.homes.ranks
            old = before.layers[name].order if before else range(len(places.order))
            rank_of = {expert: place // local for place, expert in enumerate(old)}
            moved += sum(rank_of[expert] != place // local for place, expert in enumerate(places.order))
            total, shadowed = total + len(places.order), shadowed + len(places.shadowed)
        return f"experts placed by task: {moved} of {total} moved to another rank, {shadowed} shadowed"


def choose_placement(config: RunConfig, ledger: RoutingLedger, micro_batch: int) -> AffinePlacement | None:
    """Return the placement for how tasks have used experts; None where the run wants none, or nothing is known yet.

    Args:
        config: of the run.
        ledger: of all ranks, the same on each of them.
        micro_batch: images per rank and forward pass.
    """
    ranks = config.parallel.ep_size
    if config.parallel.expert_placement == "in_order" or ranks == 1 or not ledger.layers:
        return None
    weights = _task_weights(ledger)
    if not sum(weights):
        return None
    uses = _uses(config, ledger, ranks, micro_batch)
    found = place(uses, weights, ranks, most_shadowed=config.parallel.shadowed_experts)
    return AffinePlacement(homes=TaskHomes(ranks, found.task_order), layers=found.layers)


def expected_exchange(config: RunConfig, ledger: RoutingLedger, ranks: int, images: int) -> float:
    """Return the bytes that a rank's tokens would cause in a step of one forward pass, were experts placed by `ledger`.

    Args:
        config: of the run.
        ledger: how tasks use the experts of its model.
        ranks: of an expert group.
        images: per rank and step.
    """
    uses, weights = _uses(config, ledger, ranks, images), _task_weights(ledger)
    found = place(uses, weights, ranks, most_shadowed=config.parallel.shadowed_experts)
    return expected_bytes(uses, found, weights, ranks) * images * _tokens_per_image(config)


def _uses(config: RunConfig, ledger: RoutingLedger, ranks: int, micro_batch: int) -> dict[str, LayerUse]:
    item_bytes = _PARAMETER_BYTES[config.train.dtype]
    tokens = micro_batch * ranks * _tokens_per_image(config)
    uses = {layer.name: layer_use(config.model, layer, ledger, item_bytes, ranks, tokens) for layer in ledger.layers}
    for layer in ledger.layers:
        if not layer.sees_task:  # a row per image, which the ledger counts for each of its tasks
            use, pairs = uses[layer.name], pairs_per_image(config)
            uses[layer.name] = replace(use, row_bytes=use.row_bytes / pairs, choice_bytes=use.choice_bytes / pairs)
    return uses


def _tokens_per_image(config: RunConfig) -> int:
    """Tokens of all pairs of an image."""
    return pairs_per_image(config) * (config.data.image_size // config.model.patch_size) ** 2


def _task_weights(ledger: RoutingLedger) -> list[float]:
    weights: list[float] = ledger.tokens[ledger.layers[-1].name].double().tolist()
    return weights


def layer_use(
    config: ModelConfig, layer: ExpertLayerInfo, ledger: RoutingLedger, item_bytes: int, ranks: int, tokens: int
) -> LayerUse:
    """Return how tasks use a layer, and what rows, choices and shadowed experts cost, forward and backward.

    Args:
        config: sizes.
        layer: the layer.
        ledger: how often tasks chose its experts.
        item_bytes: of a weight and an activation.
        ranks: of an expert group.
        tokens: of all pairs of an expert group in one forward pass.
    """
    head_width = config.attention_head_width if layer.kind == "attention" else 0
    expert_bytes = count_expert_parameters(config, layer.kind) * item_bytes
    return LayerUse(
        shares_TE=ledger.shares(layer.name).numpy(),
        row_bytes=4 * config.width * item_bytes,
        choice_bytes=4 * head_width * item_bytes,
        shadow_bytes=2 * (ranks - 1) * expert_bytes / tokens,
    )


def apply_placement(placement: AffinePlacement, model: ModSquad, engine: Engine) -> None:
    """Move experts, with masters and moments, to their places, and let the model find them there. A collective call."""
    order_of: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in engine.parameters.items()}
    layers = [part for part in model.backbone.modules() if isinstance(part, ExpertLayer)]
    for layer in layers:
        places = placement.layers[layer.info.name]
        layer.experts.layout = layer.experts.layout.placed(places.order, places.shadowed, engine.device)
        order_of |= {
            names[id(parameter)]: torch.tensor(places.order)
            for parameter in layer.experts.parameters()
            if getattr(parameter, "is_expert", False)
        }
    engine.place_experts(order_of)
