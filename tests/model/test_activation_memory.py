"""The formula of kept activations beside what autograd keeps."""

from typing import Any

import pytest
import torch

from configs.schema import ModelConfig
from configs.tasks import resolve_tasks
from model.activation_memory import activation_bytes, present_weight_bytes, ranks_visited
from model.dispatch import ExpertGroup
from model.mod_squad import ModSquad
from model.vit import ExpertLayer
from tests.ranks import run_ranks
from trainer.bench.comparison import saved_bytes

TASKS = resolve_tasks(("depth_zbuffer", "normal", "class_scene"))
IMAGES, SIDE = 6, 64


def kept_by_autograd(
    config: ModelConfig, dtype: torch.dtype, group: ExpertGroup | None = None, shadowed: int = 0
) -> int:
    model = ModSquad(config, TASKS, SIDE, group=group or ExpertGroup()).to(dtype)
    for layer in model.modules():
        if isinstance(layer, ExpertLayer) and shadowed:
            order = range(layer.info.num_experts)
            layer.experts.layout = layer.experts.layout.placed(order, order[:shadowed])
    images = torch.rand(IMAGES, 3, SIDE, SIDE)
    pair_image, pair_task = torch.arange(IMAGES).repeat(len(TASKS)), torch.arange(len(TASKS)).repeat_interleave(IMAGES)
    turns = torch.zeros(IMAGES, 2, dtype=torch.int64)
    return saved_bytes(lambda: model(images, pair_image, pair_task, turns), model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"placement": "every"},
        {"placement": "alternate", "depth": 3},
        {"placement": "dense"},
        {"placement": "every", "shared_blocks": 2, "task_embedding": "first"},
        {"placement": "every", "attention_top_k": 4, "mlp_top_k": 4, "mlp_experts": 16, "head_width": 16},
        {"placement": "mlp", "mlp_ratio": 8.0, "width": 64},
        {"placement": "attention", "attention_experts": 32, "router_noise": True},
    ],
    ids=str,
)
def test_formula_is_within_five_percent(changes: dict[str, Any], dtype: torch.dtype) -> None:
    config = ModelConfig.model_validate({"preset": "tiny", **changes})
    found = activation_bytes(config, TASKS, SIDE, item_bytes=dtype.itemsize)
    assert IMAGES * (found.blocks + found.rest) == pytest.approx(kept_by_autograd(config, dtype), rel=0.05)


def test_recomputation_keeps_the_inputs_of_blocks() -> None:
    config = ModelConfig.model_validate({"preset": "tiny", "placement": "every"})
    whole = activation_bytes(config, TASKS, SIDE, item_bytes=2)
    again = activation_bytes(config, TASKS, SIDE, item_bytes=2, recompute=True)
    assert again.blocks == config.depth * 64 * len(TASKS) * config.width * 2
    assert again.largest_block == whole.largest_block == pytest.approx(whole.blocks / config.depth)


def kept_with_shadows(rank: int, world: int, config: ModelConfig, dtype: torch.dtype) -> list[int]:
    return [kept_by_autograd(config, dtype, ExpertGroup(world, rank), shadowed) for shadowed in (0, 1, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_shadowed_experts(dtype: torch.dtype) -> None:
    config = ModelConfig.model_validate({"preset": "tiny", "placement": "every", "depth": 2})
    none, *some = torch.tensor(run_ranks(kept_with_shadows, 2, config, dtype)).sum(0).tolist()
    planned = [
        present_weight_bytes(config, item_bytes=dtype.itemsize, ep_size=2, shadowed=shadowed) for shadowed in (0, 1, 3)
    ]
    assert planned[0] == 0
    for found, expected in zip(some, planned[1:], strict=True):
        # Beside the weights, rows that need not travel any more are saved once instead of twice.
        assert found - none == pytest.approx(2 * expected, rel=0.05)


def test_ranks_visited() -> None:
    assert ranks_visited(16, 4, 1) == 1
    assert ranks_visited(16, 4, 16) == 4
    assert ranks_visited(16, 4, 2) == pytest.approx(2 * (1 - 70 / 1820))  # each half is missed in 70 of 1820 draws
