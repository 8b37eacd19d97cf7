"""What a plan says will leave a rank, beside a count token by token."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.exchange_plan import COUNT_BYTES, exchange_bytes, plan_exchange
from model.expert_layout import ExpertLayout

WIDTH, ITEM_BYTES, CHOICE_WIDTH = 16, 2, 5


@settings(deadline=None)
@given(st.integers(0, 12), st.sampled_from([1, 2, 4, 8]), st.integers(1, 8), st.integers(0, 10**6))
def test_each_token_goes_once_to_each_rank(tokens: int, ranks: int, top_k: int, seed: int) -> None:
    experts, local = 8, 8 // ranks
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    chosen = scores.topk(top_k).indices
    plan = plan_exchange(chosen, ExpertLayout(experts, ranks))

    owners = [[expert // local for expert in token] for token in chosen.tolist()]
    visits = [
        [sum(rank in set(token) for token in owners), sum(token.count(rank) for token in owners)]
        for rank in range(ranks)
    ]
    assert plan.counts_R2.tolist() == visits
    assert torch.equal(plan.leave_C[plan.arrive_C], torch.arange(tokens * top_k))
    assert len(set(plan.cell_C.tolist())) == tokens * top_k, "no two gates share a cell"
    left = list(zip(plan.row_C.tolist(), plan.leave_C.tolist(), plan.expert_C.tolist(), strict=True))
    assert [row for row, _, _ in left] == sorted(row for row, _, _ in left)
    homes = {row: (choice // top_k, chosen.flatten()[choice].item() // local) for row, choice, _ in left}
    for row, choice, expert in left:
        token, slot = divmod(choice, top_k)
        assert homes[row] == (token, owners[token][slot])
        assert chosen[token, slot] % local == expert

    rank = ranks - 1
    away = [[owner for owner in token if owner != rank] for token in owners]
    pairs, copies = sum(len(set(token)) for token in away), sum(map(len, away))
    found = exchange_bytes(plan, rank, width=WIDTH, item_bytes=ITEM_BYTES, choice_width=CHOICE_WIDTH)
    heads = 4 * CHOICE_WIDTH * copies * ITEM_BYTES
    assert found.bound == 4 * WIDTH * pairs * ITEM_BYTES + heads
    counts = (ranks - 1) * COUNT_BYTES
    assert found.per_copy == 4 * WIDTH * copies * ITEM_BYTES + heads + counts
    assert found.moved == found.bound + 3 * plan.slots * pairs * ITEM_BYTES + counts
