"""Which experts every token chose: what a squad would treat exactly as the large model does, told without running it.

One pass of the large model is recorded; any set of kept experts is then judged by the record alone.

Shape legend: B images, P pairs, T tasks, N patch tokens, K chosen experts, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.mod_squad import ModelOutput, ModSquad
from model.router import Routing
from model.vit import ExpertLayer, Kept


@dataclass(frozen=True, kw_only=True)
class Unaffected:
    """How much of the recorded pairs a squad treats exactly as the large model does.

    Attributes:
        layers: expert layer name -> share of tokens, of all tasks, whose K experts all survive there.
        tokens: task name -> share of its tokens whose K experts survive in every layer.
        images: task name -> share of its images all of whose tokens do; their predictions are the same.
    """

    layers: dict[str, float]
    tokens: dict[str, float]
    images: dict[str, float]


class RoutingRecord:
    """Runs the large model on pairs and keeps every token's choices on the CPU: 2 K bytes per token, pair and layer."""

    def __init__(self, model: ModSquad) -> None:
        """Start empty.

        Args:
            model: the large model; it runs in the mode that it is in, and in eval mode has no noise.
        """
        self.model = model
        self._pair_task: list[Tensor] = []
        self._pair_image: list[Tensor] = []
        self._images = 0
        self._experts_PNK: dict[str, list[Tensor]] = {layer.name: [] for layer in model.expert_layers}

    def run(self, images: Tensor, pair_image: Tensor, pair_task: Tensor) -> ModelOutput:
        """Return what the model gives for these pairs, and remember their routes; see `ModSquad.forward`."""
        routes: dict[str, Tensor] = {}
        layers = [part for part in self.model.backbone.modules() if isinstance(part, ExpertLayer)]
        hooks = [part.router.register_forward_hook(_write_to(routes, part.info.name)) for part in layers]
        try:
            output: ModelOutput = self.model(images, pair_image, pair_task)
        finally:
            for hook in hooks:
                hook.remove()
        for layer in self.model.expert_layers:
            rows = len(pair_task) if layer.sees_task else len(images)
            experts_RNK = routes[layer.name].view(rows, self.model.backbone.grid**2, layer.top_k)
            experts_PNK = experts_RNK if layer.sees_task else experts_RNK[pair_image]
            self._experts_PNK[layer.name].append(experts_PNK.to("cpu", torch.int16))
        self._pair_task.append(pair_task.cpu())
        self._pair_image.append(self._images + pair_image.cpu())
        self._images += len(images)
        return output

    @property
    def pairs(self) -> Tensor:
        """(P, 2) int64: image, counted over all runs, and task of every recorded pair, in the order of the runs."""
        return torch.stack([torch.cat(self._pair_image), torch.cat(self._pair_task)], dim=1)

    def choices(self, layer: str) -> Tensor:
        """Return (P, N, K) int64: the experts that every token chose in a layer, in the order of `pairs`."""
        return torch.cat(self._experts_PNK[layer]).long()

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks with a recorded pair."""
        seen = {task for part in self._pair_task for task in part.tolist()}
        return [spec.name for task, spec in enumerate(self.model.tasks) if task in seen]

    def unaffected(self, kept: Kept) -> Unaffected:
        """Return how much of the recorded pairs a squad with the experts `kept` leaves unchanged.

        Tasks without a recorded pair are absent.

        Raises:
            ValueError: nothing was recorded.
        """
        pair_task = torch.cat(self._pair_task) if self._pair_task else torch.empty(0)
        if not len(pair_task):
            raise ValueError("no pair is recorded to measure the unaffected share on")
        everywhere_PN = torch.ones(len(pair_task), self.model.backbone.grid**2, dtype=torch.bool)
        layers = {}
        for layer in self.model.expert_layers:
            survives_E = torch.zeros(layer.num_experts, dtype=torch.bool)
            survives_E[list(kept[layer.name])] = True
            alive_PN = torch.cat([survives_E[part.long()].all(-1) for part in self._experts_PNK[layer.name]])
            layers[layer.name] = _share(alive_PN)
            everywhere_PN &= alive_PN
        names = [spec.name for spec in self.model.tasks]
        of_task = {name: everywhere_PN[pair_task == names.index(name)] for name in self.tasks}
        return Unaffected(
            layers=layers,
            tokens={name: _share(alive_PN) for name, alive_PN in of_task.items()},
            images={name: _share(alive_PN.all(1)) for name, alive_PN in of_task.items()},
        )


def _write_to(routes: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Routing], None]:
    """Return a forward hook for a router that writes its choices to `routes[name]`."""

    def write(_router: nn.Module, _inputs: Any, routing: Routing) -> None:
        routes[name] = routing.experts_SK

    return write


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
