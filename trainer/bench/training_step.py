"""A whole model, forward and backward with all heads: beside dense vision transformers, and task by task.

The loss is the mean square of every prediction, the same for all; optimizer, matching loss and data are left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.schema import ModelConfig
from configs.tasks import resolve_tasks
from model.mod_squad import ModSquad
from trainer.bench.comparison import DTYPES, Batch, Case, Comparison, Settings, compare
from trainer.bench.expert_layers import MultiQueryAttention

TASKS = resolve_tasks("taskonomy")
IMAGES = 2
ROUNDS = 3


def compare_step(settings: Settings, dtype: str) -> list[Comparison]:
    """Measure all pairs at once against dense models, and against one pass per task."""
    model = mod_squad(settings, dtype)
    config = settings.model
    dense = dense_counterpart(model, settings, dtype)
    standard = mod_squad(settings, dtype, placement="dense", head_width=config.width // config.heads)
    sizes = f"{config.depth} blocks, {IMAGES} images x {len(TASKS)} tasks, {settings.image_size} px"
    at_once = pairs_case("all pairs at once", model)
    return [
        compare(
            "step",
            f"model: {sizes}",
            dtype,
            settings,
            pairs_case("dense ViT", dense, note="the active FLOPs of Mod-Squad, less its routers"),
            [pairs_case("Mod-Squad", model), pairs_case("standard ViT", standard, note="heads of width D / heads")],
            image_batches(settings),
            rounds=ROUNDS,
        ),
        compare(
            "step by task",
            f"Mod-Squad: {sizes}",
            dtype,
            settings,
            at_once,
            [task_by_task(model)],
            image_batches(settings),
            rounds=ROUNDS,
        ),
    ]


def mod_squad(settings: Settings, dtype: str, **changes: Any) -> ModSquad:
    """Return the model with `changes` to its configuration."""
    config = ModelConfig.model_validate({**settings.model.model_dump(), **changes})
    return ModSquad(config, TASKS, settings.image_size).to(DTYPES[dtype])


def dense_counterpart(model: ModSquad, settings: Settings, dtype: str) -> ModSquad:
    """Return the model with every expert layer replaced by a dense layer of its active FLOPs."""
    config = model.config
    dense = mod_squad(settings, dtype, placement="dense")
    for layer in model.expert_layers:
        if layer.kind == "attention":
            dense.blocks[layer.block].attention = MultiQueryAttention(
                width=config.width, heads=config.attention_top_k, head_width=config.attention_head_width
            ).to(DTYPES[dtype])
    return dense


def pairs_case(name: str, model: ModSquad, note: str = "") -> Case:
    """Return the case of one forward and backward pass over all pairs of the batch's images with all tasks."""

    def forward(batch: Batch) -> tuple[Tensor, None]:
        images = len(batch.x)
        pair_image = torch.arange(images).repeat(len(TASKS))
        pair_task = torch.arange(len(TASKS)).repeat_interleave(images)
        return _loss(list(model(batch.x, pair_image, pair_task).predictions.values())), None

    return Case(name=name, module=model, passes=[forward], note=note)


def image_batches(settings: Settings, images: int = IMAGES) -> Callable[[int], Batch]:
    """Return the draw of new random images for every round."""

    def draw(number: int) -> Batch:
        generator = torch.Generator().manual_seed(1 + number)
        images_B3SS = torch.rand(images, 3, settings.image_size, settings.image_size, generator=generator)
        return Batch(x=images_B3SS * 2 - 1)

    return draw


def task_by_task(model: ModSquad) -> Case:
    """Return the case of one pass of the backbone per task, each followed by that task's head alone."""

    def pass_of(task: int) -> Callable[[Batch], tuple[Tensor, None]]:
        def forward(batch: Batch) -> tuple[Tensor, None]:
            pair_image = torch.arange(len(batch.x))
            x_PND, _ = model.backbone(batch.x, pair_image, torch.full_like(pair_image, task))
            return _loss([model.heads[TASKS[task].name](x_PND)]), None

        return forward

    return Case(name="one pass per task", module=model, passes=[pass_of(task) for task in range(len(TASKS))])


def _loss(predictions: Sequence[Tensor]) -> Tensor:
    return torch.stack([prediction.square().mean() for prediction in predictions]).sum()
