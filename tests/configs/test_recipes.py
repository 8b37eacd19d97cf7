"""Every shipped recipe: it says how to start it, builds a model, and its batch splits over the ranks that it names."""

import re

import pytest
import torch

from cluster.groups import Layout, accumulation_steps, check_experts
from configs.load import RECIPES, load_config, recipe_names
from model.cost import count_parameters
from model.mod_squad import ModSquad

NAMES = recipe_names()
every_recipe = pytest.mark.parametrize("name", NAMES)


def comments(name: str) -> str:
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


@every_recipe
def test_model_is_built(name: str) -> None:
    config = load_config(name)
    with torch.device("meta"):
        built = ModSquad(config.model, config.task_specs, config.data.image_size)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    assert parameters == count_parameters(config.model, config.task_specs, config.data.image_size).total


@every_recipe
def test_command_is_given_and_names_the_recipe(name: str) -> None:
    assert re.search(rf"(train|modsquad) {name}\b", comments(name)), f"{name} does not say how to start it"


@pytest.mark.parametrize(("name", "world"), [("taskonomy_base", 48), ("taskonomy_base", 240), ("taskonomy_small", 8)])
def test_published_recipes_split_over_their_ranks(name: str, world: int) -> None:
    config = load_config(name)
    check_experts(config.model, Layout(world, config.parallel.ep_size).ep_size)
    micro_batch, passes = accumulation_steps(config.train.images_per_step, config.train.micro_batch, world)
    assert micro_batch * passes * world == config.train.images_per_step
    if world == 240:
        assert (micro_batch, passes) == (6, 1)


def test_published_recipes_are_the_published_models() -> None:
    """Sizes and training as measured from the official code: docs/paper.md."""
    for name, parameters in (("taskonomy_small", 55.2), ("taskonomy_base", 206.6)):
        config = load_config(name)
        count = count_parameters(config.model, config.task_specs, config.data.image_size)
        assert count.total / 1e6 == pytest.approx(parameters, abs=0.05)
        assert (config.model.placement, config.model.task_embedding) == ("alternate", "every_block")
        assert (config.model.init, config.model.shared_blocks) == ("published", 0)
        assert (config.model.renormalize_gates, config.model.router_noise) == (False, False)
        assert (config.matching.weight, config.optim.eps, config.optim.weight_decay) == (0.005, 1e-4, 0.05)
        assert config.optim.warmup_steps * 10 == config.train.steps
        assert config.optim.lr == pytest.approx(
            (4e-4 if name == "taskonomy_base" else 6e-4) * config.train.images_per_step / 256, rel=0.01
        )
