"""Costs: formulas against built models, against counted products, and against the published models."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import ModelConfig
from configs.tasks import resolve_tasks
from model import expert_runs
from model.cost import (
    FORMULAE,
    count_active_parameters,
    count_image_macs,
    count_macs,
    count_parameters,
    evaluate,
    model_costs,
)
from model.mod_squad import ModSquad
from tests.model.models import SIDE, TASKS, VARIANTS, config, images, model, pairs, parameters_of

every_variant = pytest.mark.parametrize("variant", VARIANTS)

# Path inside a built model -> the part that it is; the first match counts.
PLACES = {
    "router.noise_weight": "router noise",
    "router.weight": "router",
    "attention.experts.kv": "keys and values",
    "attention.experts": "expert attention",
    "mlp.experts": "expert MLP",
    "attention": "dense attention",
    "mlp": "dense MLP",
    "norm1": "norms",
    "norm2": "norms",
    "patch": "patch embedding",
    "position": "positions",
    "task_embedding": "task embedding",
}
HEADS = {spec.name: "dense head" if spec.dense else "vector head" for spec in TASKS}


def part_of(name: str) -> str:
    if name.startswith("heads."):
        return HEADS[name.split(".")[1]]
    return next(part for place, part in PLACES.items() if f".{place}" in name)


@every_variant
def test_every_part_has_the_parameters_that_are_built(variant: str) -> None:
    counted = dict.fromkeys(FORMULAE, 0)
    for row in model_costs(config(**VARIANTS[variant]), TASKS, SIDE):
        counted[row.part] += row.parameters
    built = dict.fromkeys(FORMULAE, 0)
    for name, parameter in model(**VARIANTS[variant]).named_parameters():
        built[part_of(name)] += parameter.numel()
    assert counted == built


@every_variant
def test_parameters_add_up_by_purpose(variant: str) -> None:
    count = count_parameters(config(**VARIANTS[variant]), TASKS, SIDE)
    built = model(**VARIANTS[variant])
    assert count.total == parameters_of(built)
    assert count.experts == sum(p.numel() for p in built.parameters() if hasattr(p, "is_expert"))
    assert count.routers == sum(p.numel() for name, p in built.named_parameters() if ".router." in name)


def products(built: ModSquad, pair_image: torch.Tensor, pair_task: torch.Tensor, count: int) -> float:
    """The MACs that run in a forward pass over `count` images."""
    # The plain attention kernel: the counter does not know the fused one. Rows of zeros that fill runs are no work.
    exact_runs = mock.patch.object(expert_runs, "ROUNDED_TO", 1)
    with exact_runs, FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        built.eval()(images(count), pair_image, pair_task)
    return counter.get_total_flops() / 2


@every_variant
def test_macs_of_one_task_are_the_products_that_run(variant: str) -> None:
    sizes = config(**VARIANTS[variant])
    for task in TASKS:
        ran = products(ModSquad(sizes, [task], SIDE), *pairs([0, 1, 2]), 3)
        # Beside what is counted: sums over tasks and the pick of the task embedding.
        assert ran / 3 == pytest.approx(count_macs(sizes, task, SIDE), rel=0.002)


@every_variant
def test_macs_of_an_image_with_all_tasks_count_shared_blocks_once(variant: str) -> None:
    sizes = config(**VARIANTS[variant])
    ran = products(model(**VARIANTS[variant]), *pairs(*[[0, 1]] * len(TASKS)), 2)
    assert ran / 2 == pytest.approx(count_image_macs(sizes, TASKS, SIDE), rel=0.005)


def test_active_parameters_are_those_of_a_model_with_one_task_one_token_and_k_experts() -> None:
    for variant in ("published", "every", "dense"):
        wide = VARIANTS[variant]
        sizes = config(**wide)
        # The smallest model that serves one token of one task; only its routers are narrower.
        smallest = config(**wide, attention_experts=sizes.attention_top_k, mlp_experts=sizes.mlp_top_k)
        for task in TASKS:
            least = ModSquad(smallest, [task], smallest.patch_size)
            routers = sum(row.parameters for row in model_costs(sizes, [task], SIDE) if row.part == "router")
            narrow = sum(p.numel() for name, p in least.named_parameters() if ".router." in name)
            assert count_active_parameters(sizes, task, SIDE) == parameters_of(least) - narrow + routers


def test_formulae_are_sums_of_products() -> None:
    assert evaluate("3 p^2 D + D", {"p": 4, "D": 5}) == 3 * 16 * 5 + 5
    assert evaluate("0", {}) == 0
    with pytest.raises(KeyError):
        evaluate("2 Z", {"D": 1})


DENSE = {"placement": "dense", "head_width": 64}
PUBLISHED_PARAMETERS = [
    ({"preset": "small"}, 55.44e6),
    ({"preset": "base"}, 206.96e6),
    ({"preset": "small"} | DENSE, 23.78e6),
    ({"preset": "base"} | DENSE, 90.01e6),
]
TASKONOMY = resolve_tasks("taskonomy")


@pytest.mark.parametrize(
    ("sizes", "published"), PUBLISHED_PARAMETERS, ids=["small", "base", "small dense", "base dense"]
)
def test_parameters_equal_the_published_ones_up_to_what_is_explained(sizes: dict[str, Any], published: float) -> None:
    config = ModelConfig.model_validate(sizes)
    with torch.device("meta"):
        built = ModSquad(config, TASKONOMY, 224)
    ours = count_parameters(config, TASKONOMY, 224).total
    assert parameters_of(built) == ours
    D = config.width
    reshading = 2 * (D + 1) * 16**2  # theirs has three channels, ours one
    class_token = 2 * D  # and its position
    norms = 8 * D - len(TASKONOMY) * 2 * D  # four in front of the two class heads; ours has one in front of every head
    assert ours + reshading + class_token + norms == pytest.approx(published, abs=5_000)


def test_macs_equal_the_published_ones_up_to_what_is_explained() -> None:
    config = ModelConfig.model_validate({"preset": "base"})
    costs = model_costs(config, TASKONOMY, 224)
    ours = sum(row.macs * row.passes for row in costs)
    assert ours == count_image_macs(config, TASKONOMY, 224)
    blocks = [row for row in costs if row.passes > 1]
    class_token = 13 * sum(
        row.count * evaluate(row.formula.macs, {**row.symbols, "N": 197}) - row.macs for row in blocks
    )
    reshading = 2 * config.width * 16**2 * 196
    theirs = ours + class_token + reshading
    assert theirs == pytest.approx(276.6e9, abs=0.05e9)
    assert theirs / 13 == pytest.approx(21.28e9, abs=0.005e9)
