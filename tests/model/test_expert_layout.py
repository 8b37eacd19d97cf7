"""Where ranks find experts: every rank the same owner, a shadowed expert at home, and no two experts in one place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from model.expert_layout import ExpertLayout

EXPERTS = 8


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.permutations(range(EXPERTS)),
    st.lists(st.integers(0, EXPERTS - 1), unique=True),
)
def test_every_expert_is_found_where_its_weights_are(ranks: int, order: list[int], shadowed: list[int]) -> None:
    layouts = [ExpertLayout(EXPERTS, ranks, rank).placed(order, shadowed) for rank in range(ranks)]
    owned = {rank: [order[place] for place in layout.owned] for rank, layout in enumerate(layouts)}
    # What a rank computes with: its own, then what every owner lends, owner by owner.
    lent = [owned[rank][number] for rank, layout in enumerate(layouts) for number in layout.lent_numbers]
    assert sorted(lent) == sorted(shadowed)
    for rank, layout in enumerate(layouts):
        assert layout.present == EXPERTS // ranks + len(shadowed)
        assert [len(other.lent_numbers) for other in layouts] == list(layout.lent)
        owner, number = layout.find(torch.arange(EXPERTS))
        for expert in range(EXPERTS):
            there = owned[int(owner[expert])] + lent
            assert there[int(number[expert])] == expert
            assert (int(owner[expert]) == rank and number[expert] >= len(owned[rank])) == (expert in shadowed)


def test_experts_in_order_need_no_table() -> None:
    for rank in range(4):
        plain = ExpertLayout(EXPERTS, 4, rank)
        for found, expected in zip(
            plain.find(torch.arange(EXPERTS)), plain.placed(range(EXPERTS), ()).find(torch.arange(EXPERTS)), strict=True
        ):
            assert torch.equal(found, expected)


def test_experts_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(UserError, match="choose an ep_size that divides 6"):
        ExpertLayout(6, 4)
