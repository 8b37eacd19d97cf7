"""The whole training objective as one module: model, task losses, task weighting and matching.

    total = sum_t w_t L_t + matching        L_t = mean over all pairs of task t in the global batch

A rank sees some of those pairs only. It divides the sum over its own pairs by the pairs of the global batch and
multiplies by `scale` = ranks * accumulation steps; the engine averages gradients over exactly these, which leaves the
mean over the global batch. The matching loss comes from globally reduced statistics and is the same on every rank, so
it is not scaled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from configs.schema import RunConfig
from configs.tasks import TaskSpec
from data_pipeline.targets import Prepared
from model.layer_routing import LayerRouting
from model.matching import Matching
from model.mod_squad import ModSquad
from trainer.losses import pair_losses
from trainer.weighting import task_weighting


@dataclass(frozen=True, kw_only=True)
class StepStatistics:
    """What one forward pass leaves for logs; everything detached. T tasks of the run.

    Attributes:
        loss_sum_T: (T,) fp32, sum of the pair losses of this rank's pairs.
        pairs_T: (T,) int64, this rank's pairs.
        matching_loss: fp32 scalar, the same on every rank.
        mutual_information: layer name -> I(T;E) in nats, fp32 scalar, the same on every rank.
        routing: routing sums of this rank's tokens.
    """

    loss_sum_T: Tensor
    pairs_T: Tensor
    matching_loss: Tensor
    mutual_information: dict[str, Tensor]
    routing: list[LayerRouting]


class Objective(nn.Module):
    """What the engine trains: `model` and the parameters of the task weighting."""

    def __init__(self, model: ModSquad, matching: Matching, config: RunConfig, tasks: Sequence[TaskSpec]) -> None:
        """Take the parts. All ranks of the default process group, if there is one, share the global batch."""
        super().__init__()
        self.model = model
        self.weighting = task_weighting(config.train, tasks)
        self.matching = matching
        self._tasks = tuple(tasks)

    def forward(self, prepared: Prepared, scale: float) -> tuple[Tensor, StepStatistics]:
        """Return (loss, statistics) of one micro-batch.

        Args:
            prepared: images, pairs and targets; a rank may hold no pair of a task, or no image at all.
            scale: ranks * accumulation steps, over which the engine averages.

        Returns:
            The loss, an fp32 scalar connected to every parameter, and its parts.
        """
        pairs_per_task = [len(prepared.targets[spec.name].values) for spec in self._tasks]
        output = self.model(
            prepared.images, prepared.pair_image, prepared.pair_task, prepared.turns, pairs_per_task=pairs_per_task
        )
        loss_sum_T = torch.stack(
            [
                pair_losses(spec, output.predictions[spec.name], prepared.targets[spec.name]).sum()
                for spec in self._tasks
            ]
        )
        share_T = scale / prepared.global_pairs.clamp_min(1)
        task_loss = self.weighting(loss_sum_T * share_T, prepared.global_pairs > 0)
        matching = self.matching(output.routing, None)
        matching_loss = matching.loss.to(task_loss.device)  # a model without experts has none that knows its device
        statistics = StepStatistics(
            loss_sum_T=loss_sum_T.detach(),
            # Not bincount: on a GPU it waits for the device.
            pairs_T=one_hot(prepared.pair_task, len(self._tasks)).sum(0),
            matching_loss=matching_loss.detach(),
            mutual_information=matching.mutual_information,
            routing=[_detached(layer) for layer in output.routing],
        )
        return task_loss + matching_loss, statistics


def _detached(layer: LayerRouting) -> LayerRouting:
    return replace(layer, prob_sum_TE=layer.prob_sum_TE.detach(), z_sum=layer.z_sum.detach())
