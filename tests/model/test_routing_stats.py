"""The usage ledger: counting, sharing over ranks, JSON."""

import json
import math

import pytest
import torch

from configs.errors import UserError
from model.layer_routing import ExpertLayerInfo, LayerRouting, routing_sums
from model.router import Routing
from model.routing_stats import RoutingLedger
from tests.ranks import run_ranks

TASKS = ("normal", "reshading", "edge_texture")
INFO = ExpertLayerInfo(name="blocks.1.mlp", kind="mlp", block=1, num_experts=4, top_k=2, sees_task=True)


def routing_of(choices: list[list[list[int]]], tasks: list[int], kept: torch.Tensor | None = None) -> LayerRouting:
    """One row per task in `tasks`; `choices[row][token]` are its K experts; probability 1/2 on each."""
    experts = torch.tensor(choices).flatten(0, 1)
    columns = experts if kept is None else kept[experts]
    probs = torch.zeros(len(experts), INFO.num_experts).scatter_(1, columns, 0.5)
    member = torch.nn.functional.one_hot(torch.tensor(tasks), len(TASKS)).T.float()
    routing = Routing(probs_SE=probs, gates_SK=probs.gather(1, columns), experts_SK=experts, logits_SE=probs.log())
    prob, tokens, counts, z, entropy = routing_sums(routing, member, kept)
    return LayerRouting(info=INFO, prob_sum_TE=prob, tokens_T=tokens, counts_TE=counts, z_sum=z, entropy_sum_T=entropy)


def test_sums_of_a_layer() -> None:
    sums = routing_of([[[0, 1], [0, 2]], [[3, 1], [3, 1]], [[0, 1], [0, 1]]], [0, 1, 0])
    assert sums.counts_TE.tolist() == [[4, 3, 1, 0], [0, 2, 0, 2], [0, 0, 0, 0]]
    assert sums.prob_sum_TE.tolist() == [[2, 1.5, 0.5, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert sums.tokens_T.tolist() == [4, 2, 0]
    assert sums.entropy_sum_T.tolist() == pytest.approx([4 * math.log(2), 2 * math.log(2), 0])


def test_kept_experts_are_counted_under_their_own_numbers() -> None:
    sums = routing_of([[[0, 1], [1, 2]]], [2], kept=torch.tensor([0, 2, 3]))
    assert sums.counts_TE[2].tolist() == [1, 0, 2, 1]


def ledger_of_two_steps() -> RoutingLedger:
    ledger = RoutingLedger([INFO], TASKS)
    ledger.update([routing_of([[[0, 1], [0, 2]], [[3, 2], [3, 2]]], [0, 1])])
    ledger.update([routing_of([[[0, 1], [0, 1]]], [0])])
    return ledger


def test_shares_and_information() -> None:
    ledger = ledger_of_two_steps()
    assert ledger.share(INFO.name, "normal").tolist() == [1.0, 0.75, 0.25, 0.0]
    assert ledger.share(INFO.name, "reshading").tolist() == [0.0, 0.0, 1.0, 1.0]
    S = torch.tensor([[0.5, 0.375, 0.125, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)
    expected = torch.special.entr(S.mean(0)).sum() - torch.special.entr(S).sum(1).mean()
    assert ledger.mutual_information(INFO.name) == pytest.approx(expected.item())
    with pytest.raises(UserError, match="edge_texture"):
        ledger.share(INFO.name, "edge_texture")


def test_an_empty_ledger_has_no_information() -> None:
    assert RoutingLedger([INFO], TASKS).mutual_information(INFO.name) == 0.0


def test_json_round_trip() -> None:
    ledger = ledger_of_two_steps()
    copy = RoutingLedger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert copy.to_json() == ledger.to_json()
    assert copy.layers == ledger.layers
    ledger.update([routing_of([[[0, 1]]], [2])])
    copy.update([routing_of([[[0, 1]]], [2])])
    assert copy.to_json() == ledger.to_json()
    with pytest.raises(UserError, match="version 0"):
        RoutingLedger.from_json({**copy.to_json(), "version": 0})


@pytest.mark.parametrize("change", [{"layers": None}, {"layers": [3]}, {"tasks": ["normal"]}, {"tasks": 3}])
def test_a_damaged_file_is_told_in_one_line(change: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"routing ledger is damaged \([^\n]*\): evaluate the run again\Z"):
        RoutingLedger.from_json({**ledger_of_two_steps().to_json(), **change})
    with pytest.raises(UserError, match="damaged"):
        RoutingLedger.from_json([])  # type: ignore[arg-type]


def one_update_per_rank(rank: int, world: int) -> dict[str, object]:
    ledger = RoutingLedger([INFO], TASKS)
    ledger.update([routing_of([[[rank, 2]]], [rank])])
    ledger.all_reduce(None)
    return ledger.to_json()


def test_ranks_add_up() -> None:
    together = RoutingLedger([INFO], TASKS)
    for rank in range(2):
        together.update([routing_of([[[rank, 2]]], [rank])])
    assert run_ranks(one_update_per_rank, 2) == [together.to_json()] * 2
