"""Products of runs against plain products, by the loop and by the grouped kernel (which runs on the CPU too)."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model import expert_runs
from model.expert_order import ExpertOrder, expert_order

D, H = 4, 8  # in float32 multiples of the kernel's 16 bytes


def order_of(lengths: Sequence[int]) -> ExpertOrder:
    """Rows that are sorted already, `lengths` of them for each expert."""
    expert = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return expert_order(expert, torch.arange(len(expert)), len(expert), len(lengths))


def runs_of(order: ExpertOrder, rows: Tensor) -> expert_runs.ExpertRuns:
    return expert_runs.expert_runs(order, expert_runs.ends_on_host(order, rows, [D, H]))


def products(order: ExpertOrder, rows: Tensor, right: Tensor, weights: Tensor, bias: Tensor) -> list[Tensor]:
    """What runs write, into buffers that held something else; rows in the order of the assignments."""
    runs = runs_of(order, rows)
    linear, biased = (runs.buffer(rows, H).fill_(torch.nan) for _ in range(2))
    outer, sums = torch.full((len(weights), D, H), torch.nan), torch.full((len(weights), H), torch.nan)
    end = 0
    for run in runs:
        taken, taken_right = run.take(rows, order.row_A), run.take(right, order.order_A)
        part = run.linear(taken, weights, linear)
        assert torch.equal(part, linear[run.places])
        run.linear(taken, weights, biased, bias)
        run.outer(taken, taken_right, outer)
        run.column_sums(taken_right, sums)
        assert run.places.start in (None, end)
        end = run.places.stop
    assert end in (None, runs.size)
    return [linear[runs.place_A], biased[runs.place_A], outer, sums]


@pytest.mark.parametrize("kernel", [False, True])
@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_products_of_runs(kernel: bool, lengths: list[int]) -> None:
    rows, right = torch.randn(sum(lengths), D), torch.randn(sum(lengths), H)
    weights, bias = torch.randn(len(lengths), D, H), torch.randn(len(lengths), H)
    expert = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    shuffle = torch.randperm(len(expert))
    order = expert_order(expert[shuffle], torch.arange(len(expert)), len(expert), len(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_runs, "_has_kernel", lambda *_: kernel)
        linear, biased, outer, sums = products(order, rows[shuffle], right[shuffle], weights, bias)
    expected = torch.cat([run @ w for run, w in zip(torch.split(rows, lengths), weights, strict=True)])
    torch.testing.assert_close(linear, expected[shuffle])
    torch.testing.assert_close(biased, (expected + bias.repeat_interleave(torch.tensor(lengths), dim=0))[shuffle])
    pairs = list(zip(torch.split(rows, lengths), torch.split(right, lengths), strict=True))
    torch.testing.assert_close(outer, torch.stack([a.t() @ b for a, b in pairs]))
    torch.testing.assert_close(sums, torch.stack([b.sum(0) for _, b in pairs]))


@given(lengths=st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_lengths_of_one_expert_s_runs_are_few_and_hold_nothing_foreign(lengths: list[int]) -> None:
    order = order_of(lengths)
    runs = runs_of(order, torch.empty(0))
    for length, run in zip(lengths, runs, strict=True):
        taken = run.take(torch.ones(sum(lengths), 2), order.row_A)
        assert len(taken) % expert_runs.ROUNDED_TO == 0
        assert 0 <= len(taken) - length < expert_runs.ROUNDED_TO
        assert torch.equal(taken.sum(0), torch.full((2,), float(length)))


def test_an_idle_expert_s_product_is_zero_whatever_the_kernel_leaves_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
        """Like the one of Blackwell: writes nothing where a run is empty."""
        out = torch.full((len(offs), len(left), right.shape[1]), torch.nan)
        for expert, (begin, end) in enumerate(itertools.pairwise([0, *offs.tolist()])):
            if begin < end:
                out[expert] = left[:, begin:end] @ right[begin:end]
        return out

    monkeypatch.setattr(expert_runs, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(F, "grouped_mm", kernel)
    left, right = torch.randn(5, D), torch.randn(5, H)
    (run,) = runs_of(order_of([0, 2, 0, 3, 0]), left).runs
    outer, sums = torch.full((5, D, H), torch.nan), torch.full((5, H), torch.nan)
    run.outer(left, right, outer)
    run.column_sums(right, sums)
    expected = torch.zeros(5, D, H)
    expected[1], expected[3] = left[:2].t() @ right[:2], left[2:].t() @ right[2:]
    torch.testing.assert_close(outer, expected)
    assert not sums[[0, 2, 4]].any()
    torch.testing.assert_close(sums[3], right[2:].sum(0))
