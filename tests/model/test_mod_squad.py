"""The whole model: predictions, one graph for any pairs, seeds, expert parallelism, and what the matching loss does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import MatchingConfig
from configs.tasks import resolve_tasks
from model.dispatch import ExpertGroup
from model.matching import Matching
from model.mod_squad import ModelOutput, ModSquad
from tests.model.models import NAMES, SIDE, TASKS, VARIANTS, config, images, model, pairs
from tests.ranks import run_ranks

BATCHES = {
    "all": (2, pairs([0, 1], [1], [0, 1], [0])),
    "tasks without pairs": (2, pairs([], [0, 1], [], [1])),
    "no pair": (2, pairs([], [], [], [])),
    "no image": (0, pairs([], [], [], [])),
}


def whole_loss(output: ModelOutput) -> Tensor:
    """Touches everything that a training loss touches."""
    loss = torch.zeros(())
    for prediction in output.predictions.values():
        loss = loss + prediction.square().sum()
    for layer in output.routing:
        loss = loss + layer.prob_sum_TE.square().sum() + 0.01 * layer.z_sum
    return loss


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_any_pairs_give_every_prediction_and_every_gradient(variant: str, batch: str) -> None:
    count, (pair_image, pair_task) = BATCHES[batch]
    built = model(**VARIANTS[variant])
    output = built(images(count), pair_image, pair_task, torch.zeros(count, 2, dtype=torch.int64))
    assert list(output.predictions) == NAMES
    for task, spec in enumerate(TASKS):
        p = int((pair_task == task).sum())
        shape = (p, spec.channels, SIDE, SIDE) if spec.dense else (p, spec.channels)
        assert output.predictions[spec.name].shape == shape
        assert output.predictions[spec.name].dtype == torch.float32
    whole_loss(output).backward()
    missing = [name for name, parameter in built.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in built.parameters())


def test_bfloat16_weights_keep_routing_sums_and_predictions_in_float32() -> None:
    built = model().to(torch.bfloat16)
    output = built(images(2), *BATCHES["all"][1])
    assert {value.dtype for value in output.predictions.values()} == {torch.float32}
    assert {layer.prob_sum_TE.dtype for layer in output.routing} == {torch.float32}
    whole_loss(output).backward()
    assert all(parameter.grad is not None for parameter in built.parameters())


def test_unsorted_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="sorted by task"):
        model()(images(1), torch.tensor([0, 0]), torch.tensor([1, 0]))


def test_weights_follow_the_seed_alone() -> None:
    first = ModSquad(config(), TASKS, SIDE, seed=1)
    before = torch.get_rng_state()
    again = ModSquad(config(), TASKS, SIDE, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    other = ModSquad(config(), TASKS, SIDE, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    drawn = [name for name, parameter in first.named_parameters() if parameter.unique().numel() > 1]
    assert drawn
    assert not any(torch.equal(first.get_parameter(name), other.get_parameter(name)) for name in drawn)


MATCHING = MatchingConfig(weight=0.5, load_balance_weight=0.1, z_loss_weight=0.01)
PARALLEL: dict[str, dict[str, Any]] = {"published": {}, "every": VARIANTS["every"], "shared": VARIANTS["shared"]}


def parallel_step(rank: int, world: int, size: int) -> dict[str, dict[str, Tensor]]:
    """Losses and gradients per variant of one step whose images are dealt to the ranks; experts over `size` ranks."""
    results = {}
    for variant, changes in PARALLEL.items():
        built = model(group=ExpertGroup(size=size, rank=rank if size > 1 else 0), **changes)
        # Four images; with four ranks the last one has no pairs at all.
        image, task = pairs([0, 1, 2], [0, 2], [1], [0])
        mine = image % world == rank
        output = built(images(4), image[mine], task[mine])
        loss = (
            whole_loss_per_pair(output) * world
            + Matching(MATCHING, built.expert_layers, len(TASKS))(output.routing, None).loss
        )
        (loss / world).backward()
        results[variant] = {name: parameter.grad for name, parameter in built.named_parameters()}
    return results


def whole_loss_per_pair(output: ModelOutput) -> Tensor:
    return sum((prediction.square().sum() for prediction in output.predictions.values()), torch.zeros(()))


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 1)])
def test_ranks_give_the_gradients_of_one_process(world: int, size: int) -> None:
    alone = parallel_step(0, 1, 1)
    ranks = run_ranks(parallel_step, world, size)
    for variant, gradients in alone.items():
        for name, gradient in gradients.items():
            parts = [rank[variant][name] for rank in ranks]
            sharded = len(parts[0]) != len(gradient)
            total = torch.cat(parts) if sharded else torch.stack(parts).sum(0)
            assert torch.allclose(total, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()), (variant, name)


def train(matching_weight: float) -> list[float]:
    """Mutual information per step of a toy run: tasks 0 and 1 want the image, tasks 2 and 3 want it upside down."""
    tasks = resolve_tasks(["reshading", "keypoints2d", "edge_texture", "depth_zbuffer"])
    built = ModSquad(config(depth=2), tasks, SIDE, seed=0)
    matching = Matching(MatchingConfig(weight=matching_weight), built.expert_layers, len(tasks))
    optimizer = torch.optim.AdamW(built.parameters(), lr=3e-3)
    pair_image, pair_task = pairs(*[list(range(4))] * len(tasks))
    history = []
    for step in range(80):
        x = images(4, seed=step)
        gray = x.mean(1, keepdim=True)
        output = built(x, pair_image, pair_task)
        result = matching(output.routing, None)
        loss = result.loss
        for task, prediction in enumerate(output.predictions.values()):
            loss = loss + (prediction - (gray if task < 2 else gray.flip(2))).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(sum(value.item() for value in result.mutual_information.values()))
    return history


def test_the_matching_loss_raises_mutual_information() -> None:
    with_matching, without = train(0.1), train(0.0)
    assert with_matching[0] == without[0] < 0.1
    assert with_matching[-1] > 1.0  # of at most 2 log 4 = 2.77 in the two expert layers
    assert with_matching[-1] > 3 * without[-1]
