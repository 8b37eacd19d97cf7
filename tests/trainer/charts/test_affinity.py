import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.layer_routing import ExpertLayerInfo
from model.routing_stats import RoutingLedger
from trainer.charts.affinity import affinity_of, expert_shares, task_affinity

TASKS = ("a", "b", "c", "d")


def ledger_of(*layers: tuple[bool, list[list[int]]]) -> RoutingLedger:
    """A ledger of layers with top-2 experts, each given by whether it sees the task and its counts (T, E)."""
    infos = [
        ExpertLayerInfo(
            name=f"blocks.{block}.mlp", kind="mlp", block=block, num_experts=4, top_k=2, sees_task=sees_task
        )
        for block, (sees_task, _) in enumerate(layers)
    ]
    ledger = RoutingLedger(infos, TASKS)
    for info, (_, counts) in zip(infos, layers, strict=True):
        ledger.counts[info.name] = torch.tensor(counts)
        ledger.tokens[info.name] = torch.tensor(counts).sum(1) // 2
    return ledger


GROUPS = [[8, 8, 0, 0], [0, 0, 4, 4], [12, 12, 0, 0], [0, 0, 6, 6]]  # a with c, b with d


def test_groups_with_experts_of_their_own_are_told_apart() -> None:
    affinity = task_affinity(ledger_of((True, GROUPS), (True, GROUPS)))
    assert affinity is not None
    assert affinity.affinity_TT == pytest.approx(np.array([[1, 0, 1, 0], [0, 1, 0, 1]] * 2))
    assert {frozenset(affinity.order[:2]), frozenset(affinity.order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    assert affinity.tree[:, 2] == pytest.approx([0, 0, 1])  # each group joins at once, the two at distance 1


def test_affinity_is_the_share_of_choices_in_common_averaged_over_layers() -> None:
    first = [
        [4, 4, 0, 0],
        [4, 0, 4, 0],
        [0, 0, 4, 4],
        [2, 2, 2, 2],
    ]  # a: half in common with b, none with c, half with d
    alike = [[8, 0, 0, 8]] * 4
    affinity = task_affinity(ledger_of((True, first), (True, alike)))
    assert affinity is not None
    assert affinity.affinity_TT[0] == pytest.approx([1, 0.75, 0.5, 0.75])


def test_layers_that_see_no_task_are_left_out() -> None:
    alike = [[8, 0, 0, 8]] * 4
    affinity = task_affinity(ledger_of((False, alike), (True, GROUPS)))
    assert affinity is not None
    assert affinity.affinity_TT[0] == pytest.approx([1, 0, 1, 0])
    assert task_affinity(ledger_of((False, alike))) is None
    assert task_affinity(ledger_of()) is None


def test_a_task_without_tokens_has_no_affinity() -> None:
    counts = [[8, 8, 0, 0], [0, 0, 0, 0], [8, 8, 0, 0], [0, 8, 8, 0]]
    ledger = ledger_of((True, counts))
    assert expert_shares(ledger, "blocks.0.mlp")[2] == pytest.approx([1, 1, 0, 0])
    affinity = task_affinity(ledger)
    assert affinity is not None
    assert np.isnan(affinity.affinity_TT[1]).all()
    assert affinity.affinity_TT[0, 3] == pytest.approx(0.5)
    assert sorted(affinity.order) == [0, 1, 2, 3]


@settings(max_examples=50, deadline=None)
@given(tasks=st.integers(1, 8), experts=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_affinity_is_a_similarity(tasks: int, experts: int, seed: int) -> None:
    share = np.random.default_rng(seed).dirichlet(np.ones(experts), size=tasks)
    affinity = affinity_of([str(task) for task in range(tasks)], [share, share[::-1]])
    matrix = affinity.affinity_TT
    assert sorted(affinity.order) == list(range(tasks))
    assert matrix == pytest.approx(matrix.T)
    assert np.diag(matrix) == pytest.approx(1)
    assert ((matrix > -1e-9) & (matrix < 1 + 1e-9)).all()
