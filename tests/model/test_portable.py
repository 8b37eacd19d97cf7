"""The traceable form of a squad: the same predictions, at the same cost, from the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.cost import count_image_macs
from model.extract import SquadModel, extract_squad
from model.portable import PortableSquad, images_clear_of_ties, trace_squad
from model.router import TaskRouter
from tests.model.models import VARIANTS, images, model

BATCH = images(3, seed=9)
PAIR = ["normal", "class_scene"]


def squad_of(tasks: list[str], kept: range | None = None, **changes: Any) -> SquadModel:
    """A squad that keeps some experts of a model with three or more per layer; None: all."""
    built = model(**changes)
    return extract_squad(
        built, tasks, {layer.name: list(kept or range(layer.num_experts)) for layer in built.expert_layers}
    )


@torch.no_grad()
def assert_same(found: dict[str, Tensor], squad: SquadModel, x: Tensor) -> None:
    expected = squad(x)
    assert list(found) == list(expected)
    for task, prediction in expected.items():
        torch.testing.assert_close(found[task], prediction, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tasks", [["semseg"], PAIR])
def test_every_variant_predicts_what_the_squad_predicts(variant: str, tasks: list[str]) -> None:
    squad = squad_of(tasks, range(1, 4), **VARIANTS[variant])
    assert_same(PortableSquad(squad)(BATCH), squad, BATCH)


@pytest.mark.parametrize("variant", ["shared", "shared router", "expert trunk", "dense"])
def test_graphs_take_any_batch(variant: str) -> None:
    squad = squad_of(PAIR, range(1, 4), **VARIANTS[variant])
    program = trace_squad(squad).module()
    for count in (1, 3):
        assert_same(program(BATCH[:count]), squad, BATCH[:count])


def test_each_token_costs_its_k_experts_however_many_the_squad_holds() -> None:
    squad = squad_of(PAIR, placement="every", shared_blocks=1)
    # Attention in products that are counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        PortableSquad(squad)(BATCH)
    macs = len(BATCH) * count_image_macs(squad.config, squad.tasks, squad.image_size)
    assert counter.get_total_flops() == 2 * macs


def test_weights_are_shared_with_the_squad() -> None:
    squad = squad_of(PAIR)
    portable = PortableSquad(squad)
    with torch.no_grad():
        for parameter in squad.parameters():
            parameter.mul_(0.9)
        assert_same(portable(BATCH), squad, BATCH)


def test_images_near_a_tie_come_last() -> None:
    squad = squad_of(["normal"], range(3), placement="mlp", depth=1)
    (router,) = (part for part in squad.modules() if isinstance(part, TaskRouter))
    drawn = images(6, seed=1)
    margins = []
    for image in drawn:
        caught = []
        hook = router.register_forward_hook(lambda _router, _inputs, routing, caught=caught: caught.append(routing))
        squad(image[None])
        hook.remove()
        best = caught[0].logits_SE[:, :3].sort(descending=True).values  # the three experts that the squad kept
        margins.append((best[:, 1] - best[:, 2]).min())
    order = torch.stack(margins).argsort(descending=True)
    assert torch.equal(images_clear_of_ties(squad, drawn, 4), drawn[order[:4]])
