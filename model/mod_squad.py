"""The whole model: a backbone over (image, task) pairs and one head per task.

Every rank runs the same graph whatever its pairs: all heads and all experts run, if need be on nothing, so that every
parameter has a gradient in every step.

Shape legend: B images, P pairs, p pairs of one task, C channels of a task, S image side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from configs.tasks import TaskSpec
from model.dispatch import ExpertGroup
from model.heads import make_head
from model.layer_routing import LayerRouting
from model.vit import VisionTransformer, expert_layers


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What one forward pass gives.

    Attributes:
        predictions: every task's name -> raw predictions of its pairs in pair order, float32: (p, C, S, S), or (p, C)
            for a vector task; p may be 0.
        routing: sums over this rank's tokens, one per expert layer, in order.
    """

    predictions: dict[str, Tensor]
    routing: list[LayerRouting]


class ModSquad(nn.Module):
    """Mod-Squad (arXiv 2212.08066): a vision transformer whose experts are chosen per task and token.

    Attributes:
        config, tasks, image_size: what it was built from.
        expert_layers: facts of every expert layer, in the order of `ModelOutput.routing`.
    """

    def __init__(
        self,
        config: ModelConfig,
        tasks: Sequence[TaskSpec],
        image_size: int,
        *,
        seed: int = 0,
        group: ExpertGroup = ExpertGroup(),  # noqa: B008 (frozen)
    ) -> None:
        """Build and initialise the model; the weights depend on `seed` only, not on `group` or torch's generator.

        Args:
            config: sizes.
            tasks: rows of the task table; their order defines task ids.
            image_size: side of the square input in pixels, a multiple of the patch side.
            seed: seed of the initialisation.
            group: ranks over which every expert layer is sharded.
        """
        super().__init__()
        self.config, self.tasks, self.image_size = config, tuple(tasks), image_size
        self.expert_layers = expert_layers(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = VisionTransformer(
                config, num_tasks=len(self.tasks), image_size=image_size, group=group, seed=seed
            )
            self.heads = nn.ModuleDict(
                {
                    spec.name: make_head(
                        spec,
                        width=config.width,
                        patch_size=config.patch_size,
                        grid=self.backbone.grid,
                        init=config.init,
                    )
                    for spec in self.tasks
                }
            )

    @property
    def blocks(self) -> nn.ModuleList:
        """The backbone's blocks, for wrapping one by one."""
        return self.backbone.blocks

    def forward(
        self,
        images: Tensor,
        pair_image: Tensor,
        pair_task: Tensor,
        turns: Tensor | None = None,
        pairs_per_task: Sequence[int] | None = None,
    ) -> ModelOutput:
        """Run all pairs.

        Args:
            images: (B, 3, S, S) floating, in [-1, 1]; B may be 0.
            pair_image: (P,) int64, index into `images`; P may be 0.
            pair_task: (P,) int64 ascending, index into `tasks`.
            turns: (B, 2) int64 from 0 to 2^32 - 1, sample and epoch of each image: router noise is drawn from them.
                Read in training with `router_noise` only.
            pairs_per_task: how often each task is in `pair_task`. None: counted, which waits for the device.

        Raises:
            ValueError: images of another size, pairs that are not sorted by task, or router noise without turns.
        """
        if pairs_per_task is None:
            pairs_per_task = self._count_pairs(pair_task.tolist())
        x_PND, routing = self.backbone(images, pair_image, pair_task, turns)
        x_by_task = x_PND.split(list(pairs_per_task))
        predictions = {name: head(x_pND) for (name, head), x_pND in zip(self.heads.items(), x_by_task, strict=True)}
        return ModelOutput(predictions=predictions, routing=routing)

    def _count_pairs(self, task_of_pair: list[int]) -> list[int]:
        if task_of_pair != sorted(task_of_pair):
            raise ValueError("pairs are not sorted by task: sort pair_image and pair_task by pair_task")
        return [task_of_pair.count(task) for task in range(len(self.tasks))]
