"""Small models and batches for the tests of this folder."""

from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from configs.tasks import TaskSpec, resolve_tasks
from model.dispatch import ExpertGroup
from model.mod_squad import ModSquad

SIDE = 16
TASKS: tuple[TaskSpec, ...] = resolve_tasks(["normal", "class_scene", "reshading", "semseg"])
NAMES = [spec.name for spec in TASKS]

# Between them: every placement, task embedding, gate rule, and a shared trunk.
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "every": {"placement": "every", "task_embedding": "first", "renormalize_gates": True},
    "shared": {"shared_blocks": 2},
    "shared router": {"placement": "every", "routers": "shared", "init": "published"},
    "dense": {"placement": "dense"},
    "dense trunk": {"placement": "dense", "shared_blocks": 3, "task_embedding": "none"},
    "expert trunk": {"shared_blocks": 3, "task_embedding": "none"},
    "mlp": {"placement": "mlp", "task_embedding": "none", "router_noise": True},
    "attention": {"placement": "attention", "head_width": 4},
}


def config(**changes: Any) -> ModelConfig:
    sizes = {"width": 16, "depth": 3, "heads": 2, "patch_size": 4, "attention_experts": 6, "mlp_experts": 4}
    return ModelConfig.model_validate({"attention_top_k": 2, "mlp_top_k": 2, **sizes, **changes})


def model(*, spread: float = 0.2, group: ExpertGroup | None = None, **changes: Any) -> ModSquad:
    """A model whose replicated weights are spread out, so that routing is uneven and every part matters."""
    built = ModSquad(config(**changes), TASKS, SIDE, seed=3, group=group or ExpertGroup())
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in built.parameters():
            if not hasattr(parameter, "is_expert"):
                parameter.add_(torch.randn(parameter.shape, generator=source), alpha=spread)
    return built


def parameters_of(module: nn.Module) -> int:
    """The number of parameters that a built module holds."""
    return sum(parameter.numel() for parameter in module.parameters())


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pairs(*of_task: list[int]) -> tuple[Tensor, Tensor]:
    """Pairs from the image numbers of each task."""
    image = [number for numbers in of_task for number in numbers]
    task = [index for index, numbers in enumerate(of_task) for _ in numbers]
    return torch.tensor(image, dtype=torch.int64), torch.tensor(task, dtype=torch.int64)
