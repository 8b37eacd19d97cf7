"""What the matching loss is for: tasks that share structure come to share experts, and others do not.

Six tasks in three groups. A task maps a token to a linear function of it, the same one for both tasks of a group, drawn
anew for each group. One real router per task and real expert MLPs learn this with and without the matching loss.
"""

import functools
from typing import NamedTuple

import pytest
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from configs.schema import MatchingConfig
from model.dispatch import ExpertGroup
from model.experts import ExpertMLP
from model.layer_routing import ExpertLayerInfo, LayerRouting, routing_sums
from model.matching import Matching
from model.router import TaskRouter

GROUP_OF_TASK = torch.tensor([0, 1, 2, 0, 1, 2])
TASKS, GROUPS = len(GROUP_OF_TASK), 3
EXPERTS, TOP_K, WIDTH, TOKENS = 6, 2, 8, 16
STEPS = 300
WEIGHT = 0.05
SEEDS = (20, 22, 24, 28)
LAYER = ExpertLayerInfo(name="layer", kind="mlp", block=0, num_experts=EXPERTS, top_k=TOP_K, sees_task=True)


class ToyLayer(nn.Module):
    """An expert layer whose tokens feel the task.

    Without a vector per task, tokens of mean zero give every linear router an even usage on average, whatever it is:
    the mutual information and its gradient would be zero.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.task_embedding = nn.Parameter(0.3 * torch.randn(TASKS, WIDTH, generator=source))
        self.router = TaskRouter(
            width=WIDTH, num_experts=EXPERTS, num_tasks=TASKS, top_k=TOP_K, renormalize_gates=True, seed=seed
        )
        self.experts = ExpertMLP(
            width=WIDTH, hidden=2 * WIDTH, num_experts=EXPERTS, top_k=TOP_K, group=ExpertGroup(), seed=seed
        )

    def forward(self, x_TND: Tensor) -> tuple[Tensor, LayerRouting]:
        x_TND = x_TND + self.task_embedding[:, None]
        routing = self.router(x_TND, torch.arange(TASKS))
        prob, tokens, counts, z, entropy = routing_sums(routing, torch.eye(TASKS), None)
        sums = LayerRouting(
            info=LAYER, prob_sum_TE=prob, tokens_T=tokens, counts_TE=counts, z_sum=z, entropy_sum_T=entropy
        )
        return self.experts(x_TND.flatten(0, 1), routing).view_as(x_TND), sums


class Trained(NamedTuple):
    """S[t, e] on fresh tokens, and I(T;E) there."""

    usage_TE: Tensor
    information: float


@functools.cache
def train(seed: int, weight: float) -> Trained:
    source = torch.Generator().manual_seed(seed)
    maps_TDD = torch.randn(GROUPS, WIDTH, WIDTH, generator=source)[GROUP_OF_TASK] / WIDTH**0.5
    layer, matching = ToyLayer(seed), Matching(MatchingConfig(weight=weight), [LAYER], TASKS)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(STEPS):
        x_TND = torch.randn(TASKS, TOKENS, WIDTH, generator=source)
        y_TND, sums = layer(x_TND)
        loss = (y_TND - x_TND @ maps_TDD).square().mean() + matching([sums], None).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        _, sums = layer(torch.randn(TASKS, 256, WIDTH, generator=source))
        information = matching([sums], None).mutual_information["layer"].item()
    return Trained(sums.prob_sum_TE / sums.tokens_T[:, None], information)


def overlap(usage_TE: Tensor) -> Tensor:
    """(T, T): the share of experts' use that two tasks have in common, 1 for equal rows."""
    return torch.minimum(usage_TE[:, None], usage_TE[None]).sum(-1)


def groups_found(usage_TE: Tensor) -> list[int]:
    """Tasks that share at least 40 % of their use, directly or over others, belong together; their number is not
    given. Groups are numbered by their first task."""
    return connected_components((overlap(usage_TE) > 0.4).numpy())[1].tolist()


def overlap_between_groups(usage_TE: Tensor) -> float:
    return overlap(usage_TE)[GROUP_OF_TASK[:, None] != GROUP_OF_TASK].mean().item()


@pytest.mark.parametrize("seed", SEEDS)
def test_training_finds_the_groups_of_tasks_that_share_structure(seed: int) -> None:
    assert groups_found(train(seed, WEIGHT).usage_TE) == GROUP_OF_TASK.tolist()


def test_without_the_matching_loss_groups_stay_blurred() -> None:
    for seed in SEEDS:
        matched, plain = train(seed, WEIGHT), train(seed, 0.0)
        assert plain.information < 0.75 * matched.information
        assert overlap_between_groups(plain.usage_TE) > 2 * overlap_between_groups(matched.usage_TE)
    assert any(groups_found(train(seed, 0.0).usage_TE) != GROUP_OF_TASK.tolist() for seed in SEEDS)
