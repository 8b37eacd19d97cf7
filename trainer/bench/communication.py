"""What expert parallelism sends: bytes of one step beside the least possible, and what task-affine placement saves.

Real routing of one global batch is replayed through the code that plans every exchange, for any number of ranks in this
process; on two and four ranks gloo processes exchange it for real, and their counts must agree.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.placement import Placement, place
from data_pipeline.planning.dealing import TaskHomes, deal_pairs, deal_slots
from data_pipeline.planning.plan import Slot
from model.cost import count_expert_parameters
from model.exchange_plan import exchange_bytes, plan_exchange
from model.expert_layout import ExpertLayout
from model.layer_routing import ExpertLayerInfo
from model.shadowing import shadow_bytes
from trainer.bench.comparison import DTYPES, Comparison, Row, Settings
from trainer.bench.exchange_on_ranks import LayerCall, sent_bytes
from trainer.bench.recorded_routing import (
    RecordedRouting,
    routing_of_new_model,
    routing_of_rooms,
    routing_of_run,
)
from trainer.distributed.affine_placement import layer_use

GROUP_SIZES = (2, 4, 8, 16)
MOST_SHADOWED = (0, 1, 2, 4)
"""Experts of a layer whose weights may travel, in the tables of task-affine placement."""
ON_PROCESSES = (2, 4)
"""Group sizes that are also exchanged by processes."""


def compare_communication(settings: Settings, dtype: str) -> list[Comparison]:
    """Measure every group size that divides the numbers of experts; both precisions use one recording."""
    recorded = _recording(settings.run, settings.image_size if settings.quick else None)
    sizes = [n for n in GROUP_SIZES if all(layer.num_experts % n == 0 for layer in recorded.layers)]
    replays = {ranks: _Replay(recorded, ranks, dtype) for ranks in sizes}
    processes = ON_PROCESSES[:1] if settings.quick else ON_PROCESSES
    return [
        comparison
        for ranks, replay in replays.items()
        for comparison in (
            replay.against_bound(count=ranks in processes),
            replay.against_affine(count=ranks in processes),
        )
    ]


@functools.cache
def _recording(run: Path | None, quick_size: int | None) -> RecordedRouting:
    if run is not None:
        return routing_of_run(run)
    return routing_of_rooms() if quick_size is None else routing_of_new_model(quick_size)


@dataclass(frozen=True)
class _Total:
    """Bytes of one step over all ranks: moved, least possible, one copy per expert; largest load of a rank."""

    moved: int
    bound: int
    per_copy: int
    load: float


def _row(name: str, total: _Total) -> Row:
    return Row(name=name, timing=None, saved_bytes=None, moved_bytes=total.moved, busiest=total.load)


class _Replay:
    """One recorded global batch on one expert group."""

    def __init__(self, recorded: RecordedRouting, ranks: int, dtype: str) -> None:
        self._recorded, self._ranks, self._dtype = recorded, ranks, dtype
        self._item_bytes = DTYPES[dtype].itemsize
        images = int(recorded.pairs[:, 0].max()) + 1
        served = [np.sort(recorded.pairs[recorded.pairs[:, 0] == image, 1]) for image in range(images)]
        self._slots = [Slot(image, tuple(tasks.tolist()), 0) for image, tasks in enumerate(served) if len(tasks)]
        self._alike = self._homes(deal_slots(self._slots[: len(self._slots) // ranks * ranks], ranks))

    def against_bound(self, *, count: bool) -> Comparison:
        """Return the exchange beside the lower bound and beside one copy per expert; also counted on processes."""
        total = self._total(self._alike, None)
        moved = [self._traffic(self._call(layer, self._alike)).moved for layer in self._recorded.layers]
        by_kind: dict[str, list[int]] = {layer.kind: [] for layer in self._recorded.layers}
        for layer, layer_bytes in zip(self._recorded.layers, moved, strict=True):
            by_kind[layer.kind].append(layer_bytes)
        note = ", ".join(f"{sum(x) / len(x) / 1e6:.1f} MB per {kind} layer" for kind, x in by_kind.items())
        rows = [Row(name="exchange", timing=None, saved_bytes=None, moved_bytes=total.moved, note=note)]
        rows.append(Row(name="one copy per expert", timing=None, saved_bytes=None, moved_bytes=total.per_copy))
        if count:
            calls = [self._call(layer, self._alike) for layer in self._recorded.layers]
            counted = sent_bytes(calls, self._ranks, DTYPES[self._dtype])
            rows.append(
                Row(name=f"exchange, {self._ranks} processes", timing=None, saved_bytes=None, moved_bytes=counted)
            )
        least = Row(name="lower bound", timing=None, saved_bytes=None, moved_bytes=total.bound)
        return self._comparison("comm", least, rows)

    def against_affine(self, *, count: bool) -> Comparison:
        """Return task-affine placement and dealing beside experts in order and tasks dealt alike."""
        rows = []
        for most in MOST_SHADOWED:
            placement = self.place(most)
            dealt = deal_pairs(self._slots, self._ranks, TaskHomes(self._ranks, placement.task_order))
            homes, name = self._homes(dealt), f"task-affine, {most} shadowed" if most else "task-affine"
            rows.append(_row(name, self._total(homes, placement)))
        if count:
            calls = [self._call(layer, homes, placement) for layer in self._recorded.layers]
            counted = sent_bytes(calls, self._ranks, DTYPES[self._dtype])
            rows.append(
                Row(name=f"{name}, {self._ranks} processes", timing=None, saved_bytes=None, moved_bytes=counted)
            )
        return self._comparison("placement", _row("dealt alike", self._total(self._alike, None)), rows)

    def place(self, most_shadowed: int) -> Placement:
        """Return the placement for how tasks used experts on other images."""
        recorded = self._recorded
        weights = np.bincount(recorded.pairs[:, 1], minlength=len(recorded.ledger.tasks))
        tokens = len(recorded.pairs) * recorded.choices[recorded.layers[0].name].shape[1]
        uses = {
            layer.name: layer_use(recorded.config, layer, recorded.ledger, self._item_bytes, self._ranks, tokens)
            for layer in recorded.layers
        }
        return place(uses, weights.tolist(), self._ranks, most_shadowed=most_shadowed)

    def _homes(self, dealt: Sequence[Sequence[Slot]]) -> NDArray[np.int64]:
        """Return (P,) the rank of each pair; -1 for pairs of images that do not divide evenly."""
        rank_of = {(slot.sample, task): rank for rank, part in enumerate(dealt) for slot in part for task in slot.tasks}
        return np.array([rank_of.get((image, task), -1) for image, task in self._recorded.pairs.tolist()])

    def _call(self, layer: ExpertLayerInfo, homes: NDArray[np.int64], placement: Placement | None = None) -> LayerCall:
        config, choices_PNK = self._recorded.config, self._recorded.choices[layer.name]
        layouts = [ExpertLayout(layer.num_experts, self._ranks, rank) for rank in range(self._ranks)]
        if placement is not None:
            places = placement.layers[layer.name]
            layouts = [layout.placed(places.order, places.shadowed) for layout in layouts]
        return LayerCall(
            experts_SK=[choices_PNK[torch.from_numpy(homes == rank)].flatten(0, 1) for rank in range(self._ranks)],
            layouts=layouts,
            width=config.width,
            choice_width=config.attention_head_width if layer.kind == "attention" else 0,
            expert_numbers=count_expert_parameters(config, layer.kind),
        )

    def _total(self, homes: NDArray[np.int64], placement: Placement | None) -> _Total:
        layers = [self._traffic(self._call(layer, homes, placement)) for layer in self._recorded.layers]
        return _Total(
            moved=sum(layer.moved for layer in layers),
            bound=sum(layer.bound for layer in layers),
            per_copy=sum(layer.per_copy for layer in layers),
            load=max(layer.load for layer in layers),
        )

    def _traffic(self, call: LayerCall) -> _Total:
        plans = [plan_exchange(chosen, layout) for chosen, layout in zip(call.experts_SK, call.layouts, strict=True)]
        sizes = {"width": call.width, "item_bytes": self._item_bytes, "choice_width": call.choice_width}
        found = [exchange_bytes(plan, rank, **sizes) for rank, plan in enumerate(plans)]
        shadows = sum(shadow_bytes(layout, call.expert_numbers, self._item_bytes) for layout in call.layouts)
        served_R = torch.stack([plan.counts_R2[:, 1] for plan in plans]).sum(0).double()
        return _Total(
            moved=sum(rank.moved for rank in found) + shadows,
            bound=sum(rank.bound for rank in found),
            per_copy=sum(rank.per_copy for rank in found),
            load=float(served_R.max() / served_R.mean()),
        )

    def _comparison(self, name: str, reference: Row, rows: list[Row]) -> Comparison:
        recorded = self._recorded
        title = (
            f"{name}: bytes of one step, {len(recorded.layers)} expert layers, {len(recorded.pairs)} pairs, "
            f"ep_size {self._ranks}, routing of {recorded.source}"
        )
        return Comparison(
            name=f"{name} ep {self._ranks}", title=title, dtype=self._dtype, reference=reference, rows=tuple(rows)
        )
