"""The real model at its smallest, with the matching loss, in the place of the toy model."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import MatchingConfig, ModelConfig
from configs.tasks import resolve_tasks
from model.dispatch import ExpertGroup
from model.matching import Matching
from model.mod_squad import ModSquad

SIDE = 16
TASKS = resolve_tasks(("depth_euclidean", "normal", "class_object"))
SIZES = ModelConfig(
    width=16,
    depth=2,
    heads=2,
    patch_size=8,
    attention_experts=4,
    attention_top_k=2,
    mlp_experts=4,
    mlp_top_k=2,
)


class SquadLoss(nn.Module):
    """Mean square of what is predicted for each pair, less a constant; minus mutual information."""

    def __init__(self, group: ExpertGroup, world: dist.ProcessGroup | None, sizes: ModelConfig = SIZES) -> None:
        super().__init__()
        self.model = ModSquad(sizes, TASKS, SIDE, group=group)
        self.matching = Matching(MatchingConfig(weight=0.1), self.model.expert_layers, len(TASKS))
        self.world = world

    def forward(self, images: Tensor, tasks: Tensor, turns: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Take (B, 3, S, S) images, the (B, 2) tasks that each serves, and for router noise (B, 2) turns."""
        pair_task, order = tasks.flatten().sort(stable=True)
        output = self.model(images, order // tasks.shape[1], pair_task, turns)
        squares = [(x - 0.3).square().flatten(1).mean(1).sum() for x in output.predictions.values()]
        matching = self.matching(output.routing, self.world)
        return torch.stack(squares).sum() / tasks.numel() + matching.loss, squares


def squad_batches(steps: int, samples: int) -> list[tuple[Tensor, Tensor]]:
    """Global batches; some ranks get no pair of some task."""
    generator = torch.Generator().manual_seed(2)
    tasks = torch.tensor([[0, 1], [0, 1], [0, 2], [2, 1]]).repeat_interleave(samples // 4, 0)
    return [(torch.randn(samples, 3, SIDE, SIDE, generator=generator), tasks) for _ in range(steps)]
