"""Counts what an exchange really sends, on gloo processes of this machine: forward and backward of recorded routing."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from model.dispatch import ExpertGroup, make_exchange
from model.expert_layout import ExpertLayout
from model.shadowing import present_weights


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One call of an expert layer, all ranks together.

    Attributes:
        experts_SK: rank -> (S, K) int64, the experts of its tokens.
        layouts: rank -> where it finds the experts.
        width: D.
        choice_width: d_h for attention, 0 for an MLP.
        expert_numbers: parameters of one expert.
    """

    experts_SK: Sequence[Tensor]
    layouts: Sequence[ExpertLayout]
    width: int
    choice_width: int
    expert_numbers: int


def sent_bytes(calls: Sequence[LayerCall], ranks: int, dtype: torch.dtype) -> int:
    """Return the bytes that all ranks sent, in all calls."""
    with tempfile.TemporaryDirectory(prefix="modsquad_bench_") as folder:
        spawn(_run_rank, (ranks, folder, calls, dtype), ranks)  # type: ignore[no-untyped-call]
        return sum(int((Path(folder) / f"sent_{rank}").read_text()) for rank in range(ranks))


def _run_rank(rank: int, ranks: int, folder: str, calls: Sequence[LayerCall], dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    group = ExpertGroup(ranks, rank)
    for call in calls:
        _forward_and_backward(call, rank, group, dtype)
    (Path(folder) / f"sent_{rank}").write_text(str(group.meter.sent_bytes))
    dist.barrier()
    dist.destroy_process_group()


def _forward_and_backward(call: LayerCall, rank: int, group: ExpertGroup, dtype: torch.dtype) -> None:
    """What a layer exchanges; what its experts compute is left out."""
    experts_SK, layout = call.experts_SK[rank], call.layouts[rank]
    owned = torch.zeros(len(layout.owned), call.expert_numbers, dtype=dtype, requires_grad=True)
    (weights,) = present_weights([owned], layout, group)
    x_SD = torch.zeros(len(experts_SK), call.width, dtype=dtype, requires_grad=True)
    gates_SK = torch.zeros(experts_SK.shape, dtype=dtype, requires_grad=True)
    exchange = make_exchange(experts_SK, layout, group)
    rows_MD, gates_A = exchange.dispatch(x_SD, gates_SK)
    y_MD = rows_MD + gates_A.sum() + weights.sum()
    if call.choice_width:
        q_AF = rows_MD.index_select(0, exchange.order.row_A)[:, : call.choice_width]
        y_MD = y_MD + exchange.choices_out(exchange.choices_home(q_AF)).sum()
    exchange.combine(y_MD).sum().backward()  # type: ignore[no-untyped-call]
