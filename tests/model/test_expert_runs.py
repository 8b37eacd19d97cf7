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


def products(lengths: Sequence[int], rows: Tensor, right: Tensor, weights: Tensor, bias: Tensor) -> list[Tensor]:
    """What runs write, into buffers that held something else."""
    out = [torch.full(shape, torch.nan) for shape in ((len(rows), H), (len(rows), H), (len(lengths), D, H))]
    sums = torch.full((len(lengths), H), torch.nan)
    for run in expert_runs.expert_runs(order_of(lengths), rows, [D, H]):
        part = run.linear(rows[run.rows], weights, out[0])
        assert torch.equal(part, out[0][run.rows])
        run.linear(rows[run.rows], weights, out[1], bias)
        run.outer(rows[run.rows], right[run.rows], out[2])
        run.column_sums(right[run.rows], sums)
    return [*out, sums]


@pytest.mark.parametrize("kernel", [False, True])
@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_products_of_runs(kernel: bool, lengths: list[int]) -> None:
    rows, right = torch.randn(sum(lengths), D), torch.randn(sum(lengths), H)
    weights, bias = torch.randn(len(lengths), D, H), torch.randn(len(lengths), H)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_runs, "_has_kernel", lambda *_: kernel)
        linear, biased, outer, sums = products(lengths, rows, right, weights, bias)
    expected = torch.cat([run @ w for run, w in zip(torch.split(rows, lengths), weights, strict=True)])
    torch.testing.assert_close(linear, expected)
    torch.testing.assert_close(biased, expected + bias.repeat_interleave(torch.tensor(lengths), dim=0))
    pairs = list(zip(torch.split(rows, lengths), torch.split(right, lengths), strict=True))
    torch.testing.assert_close(outer, torch.stack([a.t() @ b for a, b in pairs]))
    torch.testing.assert_close(sums, torch.stack([b.sum(0) for _, b in pairs]))


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
    (run,) = expert_runs.expert_runs(order_of([0, 2, 0, 3, 0]), left, [D, H])
    outer, sums = torch.full((5, D, H), torch.nan), torch.full((5, H), torch.nan)
    run.outer(left, right, outer)
    run.column_sums(right, sums)
    expected = torch.zeros(5, D, H)
    expected[1], expected[3] = left[:2].t() @ right[:2], left[2:].t() @ right[2:]
    torch.testing.assert_close(outer, expected)
    assert not sums[[0, 2, 4]].any()
    torch.testing.assert_close(sums[3], right[2:].sum(0))
