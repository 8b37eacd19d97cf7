"""Experts over ranks against one process: outputs, all gradients, and how much travels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.attention import ExpertAttention
from model.dispatch import ExpertGroup, TrafficMeter, make_exchange, sum_over_ranks
from model.exchange_plan import exchange_bytes, plan_exchange
from model.expert_layout import ExpertLayout
from model.expert_order import expert_order, sum_runs
from model.experts import ExpertMLP
from model.router import Routing, TaskRouter
from model.shadowing import shadow_bytes
from tests.model.routings import relative_error
from tests.ranks import run_ranks

WIDTH, HIDDEN, TOKENS, EXPERTS, TASKS = 8, 12, 3, 8, 3


@dataclass(frozen=True)
class Case:
    """A global batch of rows (of TOKENS tokens each) dealt to ranks, and how its tokens choose experts."""

    kind: Literal["mlp", "attention"]
    rows: tuple[int, ...]
    top_k: int = 3
    ep_size: int = 2
    choice: Literal["router", "first_experts", "last_experts"] = "router"
    recompute: bool = False
    shadowed: tuple[int, ...] = ()

    def layout(self, rank: int) -> ExpertLayout:
        return ExpertLayout(EXPERTS, self.ep_size, rank % self.ep_size).placed(range(EXPERTS), self.shadowed)

    def planned_layout(self, rank: int) -> ExpertLayout:
        """In order without tables, where nothing is shadowed."""
        return self.layout(rank) if self.shadowed else ExpertLayout(EXPERTS, self.ep_size, rank % self.ep_size)


def cases(world: int, ep_size: int) -> list[Case]:
    """Even, uneven, empty, skewed, recomputed, shadowed (of one owner, of some, all); top_k 1, and all experts."""
    kinds: tuple[Literal["mlp", "attention"], ...] = ("mlp", "attention")
    even, uneven, first, none = (3,) * world, (0, 5, 1, 2)[:world], (4, 0, 0, 0)[:world], (0,) * world
    return [
        case
        for kind in kinds
        for case in (
            Case(kind, even, ep_size=ep_size),
            Case(kind, uneven, ep_size=ep_size, top_k=1),
            Case(kind, uneven, ep_size=ep_size, top_k=EXPERTS),
            Case(kind, first, ep_size=ep_size, choice="last_experts"),
            Case(kind, even, ep_size=ep_size, choice="first_experts"),
            Case(kind, none, ep_size=ep_size),
            Case(kind, uneven, ep_size=ep_size, recompute=True),
            Case(kind, uneven, ep_size=ep_size, shadowed=(6,)),
            Case(kind, uneven, ep_size=ep_size, shadowed=(1, 0, 5), recompute=True),
            Case(kind, first, ep_size=ep_size, shadowed=tuple(range(EXPERTS))),
        )
    ]


def choose(case: Case, routing: Routing) -> Routing:
    """The routing with the case's forced choice."""
    if case.choice == "router":
        return routing
    first = 0 if case.choice == "first_experts" else EXPERTS - case.top_k
    experts = torch.arange(first, first + case.top_k).expand(len(routing.probs_SE), -1)
    return Routing(routing.probs_SE, routing.probs_SE.gather(1, experts), experts, routing.logits_SE)


def layer_results(case: Case, rows: slice, group: ExpertGroup) -> dict[str, Tensor]:
    """Output and all gradients of one expert layer on some rows of the global batch, float64."""
    shape = (sum(case.rows), TOKENS, WIDTH)
    generator = torch.Generator().manual_seed(4)
    x_all = torch.randn(shape, generator=generator, dtype=torch.float64)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)[rows]
    task = (torch.arange(len(x_all)) % TASKS)[rows]
    x = x_all[rows].clone().requires_grad_()

    router = TaskRouter(width=WIDTH, num_experts=EXPERTS, num_tasks=TASKS, top_k=case.top_k, seed=2)
    sizes = {"width": WIDTH, "num_experts": EXPERTS, "top_k": case.top_k, "seed": 1}
    layer: ExpertMLP | ExpertAttention
    if case.kind == "mlp":
        layer = ExpertMLP(hidden=HIDDEN, group=group, **sizes).double()
    else:
        layer = ExpertAttention(head_width=4, group=group, **sizes).double()
    if case.shadowed and group.size > 1:
        layer.layout = case.layout(group.rank)

    def forward(x: Tensor) -> Tensor:
        tokens = x if case.kind == "attention" else x.flatten(0, 1)
        y = layer(tokens, choose(case, router(x, task)))
        assert isinstance(y, Tensor)
        return y.view(x.shape)

    y = checkpoint(forward, x, use_reentrant=False) if case.recompute else forward(x)
    assert isinstance(y, Tensor)
    forward_bytes = group.meter.sent_bytes
    torch.autograd.backward((y * upstream).sum())
    results = {"y": y.detach(), "x": x.grad, "router": router.weight.grad}
    results |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    results |= {"forward_bytes": torch.tensor(forward_bytes), "all_bytes": torch.tensor(group.meter.sent_bytes)}
    results["exchanges"] = torch.tensor(group.meter.exchanges)
    assert all(result is not None for result in results.values())
    return {name: result for name, result in results.items() if result is not None}


def results_of_rank(rank: int, world: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    """What `layer_results` gives on this rank, case by case."""
    results = []
    groups = {}
    for size in sorted({case.ep_size for case in cases}):
        for first in range(0, world, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= rank < first + size:
                groups[size] = group
    for case in cases:
        begin = sum(case.rows[:rank])
        group = ExpertGroup(case.ep_size, rank % case.ep_size, groups[case.ep_size])
        results.append(layer_results(case, slice(begin, begin + case.rows[rank]), group))
    return results


def merged(case: Case, ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' results as one process would have them: shards joined, replicas summed."""
    whole = {}
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        if name in ("y", "x"):
            whole[name] = torch.cat(parts)
        elif name in ("w1", "b1", "w2", "b2", "wq", "wo"):
            shards = [torch.stack(parts[shard :: case.ep_size]).sum(0) for shard in range(case.ep_size)]
            whole[name] = torch.cat(shards)
        else:
            whole[name] = torch.stack(parts).sum(0)
    return whole


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world: int) -> None:
    todo = cases(world, ep_size=world)
    if world == 4:  # two groups that hold the same shards
        todo += [Case("mlp", (0, 5, 1, 2)), Case("attention", (0, 5, 1, 2))]
    by_rank = run_ranks(results_of_rank, world, todo)
    for case, ranks in zip(todo, zip(*by_rank, strict=True), strict=True):
        together = merged(case, list(ranks))
        alone = layer_results(case, slice(None), ExpertGroup())
        for name in alone.keys() - {"forward_bytes", "all_bytes", "exchanges"}:
            # Routers are float32 inside, hence not 1e-12.
            assert relative_error(together[name], alone[name]) < 2e-6, (case, name)
        check_traffic(case, together)


def check_traffic(case: Case, together: dict[str, Tensor]) -> None:
    """Each token travels once to each other rank that it needs, and its row comes back once."""
    begin, pairs, choices = 0, 0, 0
    experts_SK = layer_choices(case)
    for rank, rows in enumerate(case.rows):
        end = begin + rows * TOKENS
        for experts in experts_SK[begin:end].tolist():
            owners = [
                rank % case.ep_size if expert in case.shadowed else expert // (EXPERTS // case.ep_size)
                for expert in experts
            ]
            pairs += len(set(owners) - {rank % case.ep_size})
            choices += sum(owner != rank % case.ep_size for owner in owners)
        begin = end
    slots = min(case.top_k, EXPERTS // case.ep_size + len(case.shadowed))
    counts = len(case.rows) * (case.ep_size - 1) * 2 * 8
    backward = 8 * (pairs * (WIDTH + slots + WIDTH) + (choices * 2 * 4 if case.kind == "attention" else 0))
    forward = counts + backward + 8 * pairs * slots  # the codes of the experts
    expert = {"mlp": 2 * WIDTH * HIDDEN + HIDDEN + WIDTH, "attention": 2 * WIDTH * 4}[case.kind]
    weights = 8 * expert * len(case.shadowed) * (case.ep_size - 1) * (len(case.rows) // case.ep_size)
    forward, backward = forward + weights, backward + weights
    assert together["forward_bytes"].item() == forward
    forwards = 2 if case.recompute else 1
    assert together["all_bytes"].item() == forwards * forward + backward
    if not case.recompute:
        assert together["all_bytes"].item() == planned_bytes(case)
    exchanges = [count + bool(case.shadowed) for count in {"mlp": (3, 2), "attention": (5, 4)}[case.kind]]
    assert together["exchanges"].item() == len(case.rows) * (forwards * exchanges[0] + exchanges[1])


def planned_bytes(case: Case) -> int:
    """What the plans of all ranks say will move, without moving anything."""
    by_rank = layer_choices(case).split([rows * TOKENS for rows in case.rows])
    sizes = {"width": WIDTH, "item_bytes": 8, "choice_width": 4 if case.kind == "attention" else 0}
    layouts = [case.planned_layout(rank) for rank in range(len(by_rank))]
    plans = [plan_exchange(experts_SK, layout) for experts_SK, layout in zip(by_rank, layouts, strict=True)]
    tokens = sum(exchange_bytes(plan, rank % case.ep_size, **sizes).moved for rank, plan in enumerate(plans))
    expert = {"mlp": 2 * WIDTH * HIDDEN + HIDDEN + WIDTH, "attention": 2 * WIDTH * 4}[case.kind]
    return tokens + sum(shadow_bytes(layout, expert, 8) for layout in layouts)


def layer_choices(case: Case) -> Tensor:
    """(S, K) experts of the global batch."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((sum(case.rows), TOKENS, WIDTH), generator=generator, dtype=torch.float64)
    router = TaskRouter(width=WIDTH, num_experts=EXPERTS, num_tasks=TASKS, top_k=case.top_k, seed=2)
    return choose(case, router(x, torch.arange(len(x)) % TASKS)).experts_SK


def bfloat16_layer(rank: int, kind: str, group: ExpertGroup) -> dict[str, Tensor]:
    """Output and gradients of a bfloat16 layer on this rank's rows."""
    source = torch.Generator().manual_seed(rank)
    x = torch.randn(20, TOKENS, WIDTH, generator=source).bfloat16().requires_grad_()
    upstream = torch.randn(20, TOKENS, WIDTH, generator=source).bfloat16()
    router = TaskRouter(width=WIDTH, num_experts=EXPERTS, num_tasks=1, top_k=3, seed=2).bfloat16()
    layer: torch.nn.Module
    if kind == "mlp":
        layer = ExpertMLP(width=WIDTH, hidden=HIDDEN, num_experts=EXPERTS, top_k=3, group=group).bfloat16()
        y = layer(x.flatten(0, 1), router(x, None)).view_as(x)
    else:
        layer = ExpertAttention(width=WIDTH, head_width=4, num_experts=EXPERTS, top_k=3, group=group).bfloat16()
        y = layer(x, router(x, None))
    y.backward(upstream)
    gradients = {name: parameter.grad for name, parameter in [("x", x), *layer.named_parameters()]}
    found = {"y": y.detach(), "router": router.weight.grad, **gradients}
    assert all(value is not None and value.dtype == torch.bfloat16 for value in found.values())
    return {name: value for name, value in found.items() if value is not None}


def summed(rank: int, world: int) -> tuple[Tensor, Tensor]:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    total = sum_over_ranks(x * (rank + 1), None)
    torch.autograd.backward((total * torch.tensor([1.0, 10.0]) * (rank + 1)).sum())
    assert x.grad is not None
    return total.detach(), x.grad


BFloat16Results = dict[str, list[dict[str, Tensor]]]


def bfloat16_and_sums(rank: int, world: int) -> tuple[BFloat16Results, tuple[Tensor, Tensor]]:
    groups = (ExpertGroup(), ExpertGroup(world, rank))
    layers = {kind: [bfloat16_layer(rank, kind, group) for group in groups] for kind in ("mlp", "attention")}
    return layers, summed(rank, world)


def test_bfloat16_over_ranks_and_autograd_sum() -> None:
    ranks = run_ranks(bfloat16_and_sums, 2)
    for kind in ("mlp", "attention"):
        alone, together = zip(*(layers[kind] for layers, _ in ranks), strict=True)
        case = Case(kind, (20, 20))  # type: ignore[arg-type]
        exact, ours = merged_bfloat16(alone), merged(case, list(together))
        for name, value in exact.items():
            assert relative_error(ours[name], value) < 0.01, (kind, name)
    for rank, (_, (total, grad)) in enumerate(ranks):
        assert total.tolist() == [3.0, 6.0]
        assert grad.tolist() == [3.0 * (rank + 1), 30.0 * (rank + 1)]  # both ranks' upstream gradients, summed


def merged_bfloat16(ranks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of whole layers that saw the rows of one rank each, as one layer that saw all would have them."""
    parts = {name: [rank[name].float() for rank in ranks] for name in ranks[0]}
    return {name: torch.cat(part) if name in ("y", "x") else torch.stack(part).sum(0) for name, part in parts.items()}


def test_sum_over_ranks_is_the_identity_without_ranks() -> None:
    x = torch.randn(3)
    assert sum_over_ranks(x, None) is x


def test_one_rank_sends_nothing() -> None:
    group = ExpertGroup()
    exchange = make_exchange(torch.tensor([[0, 2], [2, 1]]), group.layout(3), group)
    x = torch.randn(2, 4)
    rows, gates = exchange.dispatch(x, torch.tensor([[0.6, 0.4], [0.7, 0.3]]))
    assert rows is x
    assert gates.tolist() == pytest.approx([0.6, 0.4, 0.7, 0.3])
    assert exchange.combine(x) is x
    assert group.meter == TrafficMeter(0, 0)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=6, unique=True), max_size=8))
def test_expert_order(chosen: list[list[int]]) -> None:
    expert = torch.tensor([e for experts in chosen for e in experts], dtype=torch.int64)
    row = torch.tensor([m for m, experts in enumerate(chosen) for _ in experts], dtype=torch.int64)
    order = expert_order(expert, row, len(chosen), 5)
    assert torch.equal(expert[order.order_A], order.expert_A)
    assert torch.equal(row[order.order_A], order.row_A)
    assert torch.equal(order.order_A[order.place_A], torch.arange(len(expert)))
    assert order.ends_E.tolist() == [sum(e <= last for e in expert.tolist()) for last in range(5)]
    pairs = list(zip(order.expert_A.tolist(), order.row_A.tolist(), strict=True))
    assert pairs == sorted(pairs)

    values = torch.randn(len(expert), 3)
    sums = sum_runs(values[order.order_A], order.place_A, order.bounds)
    torch.testing.assert_close(sums, torch.zeros(len(chosen), 3).index_add(0, row, values))
