"""Costs: formulas against built models, against counted products, and against the published models."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import ModelConfig
from configs.tasks import resolve_tasks
from model.cost import count_macs, count_parameters
from model.extract import SquadModel
from model.mod_squad import ModSquad
from model.vit import expert_layers
from tests.model.models import SIDE, TASKS, VARIANTS, config, images, model, parameters_of


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_built_models(variant: str) -> None:
    count = count_parameters(config(**VARIANTS[variant]), TASKS, SIDE)
    built = model(**VARIANTS[variant])
    assert count.total == parameters_of(built)
    assert count.experts == sum(p.numel() for p in built.parameters() if hasattr(p, "is_expert"))
    assert count.routers == sum(p.numel() for name, p in built.named_parameters() if ".router." in name)


@pytest.mark.parametrize("variant", ["published", "shared"])
@pytest.mark.parametrize("task", range(len(TASKS)))
def test_macs_of_a_squad_are_the_products_that_run(variant: str, task: int) -> None:
    sizes = config(**VARIANTS[variant])
    kept = {layer.name: list(range(layer.num_experts)) for layer in expert_layers(sizes)}
    squad = SquadModel(sizes, TASKS[task], SIDE, kept).eval()
    # The plain attention kernel: the counter does not know the fused one.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        squad(images(3))
    # Beside what is counted: sums over tasks and the pick of the task embedding.
    assert counter.get_total_flops() / 2 / 3 == pytest.approx(count_macs(sizes, TASKS[task], SIDE), rel=0.002)


@pytest.mark.parametrize(
    ("preset", "published_parameters", "published_macs"), [("small", 55.44e6, None), ("base", 206.96e6, 21.28e9)]
)
def test_presets_match_the_published_models(
    preset: str, published_parameters: float, published_macs: float | None
) -> None:
    sizes = ModelConfig.model_validate({"preset": preset})
    tasks = resolve_tasks("taskonomy")
    with torch.device("meta"):
        built = ModSquad(sizes, tasks, 224)
    assert parameters_of(built) == count_parameters(sizes, tasks, 224).total
    # Theirs has three channels for reshading, a class token with its position, and no norm in front of each head; what
    # is left are the norms of its class heads, and the digits in which it is given.
    explained = 2 * (sizes.width + 1) * 16**2 + 2 * sizes.width - len(tasks) * 2 * sizes.width
    assert count_parameters(sizes, tasks, 224).total + explained == pytest.approx(published_parameters, abs=12_000)
    if published_macs:
        macs = [count_macs(sizes, task, 224) for task in tasks]
        assert sum(macs) / len(macs) == pytest.approx(published_macs, rel=0.005)
