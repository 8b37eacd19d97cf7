"""Sections of the report on what the experts do: who uses whom, which tasks are alike, where gradients conflict."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.layer_routing import ExpertLayerInfo
from model.routing_stats import RoutingLedger
from trainer.charts.affinity import expert_shares, task_affinity
from trainer.charts.experts import (
    ConflictCurve,
    ConflictMap,
    ExpertMap,
    affinity_chart,
    conflict_curve_chart,
    conflict_map_chart,
    expert_map_chart,
)
from trainer.charts.figure import Floats
from trainer.evaluation.gradient_conflict import pooled_cosine, summarise, summary_rows
from trainer.report import page as html
from trainer.run_files import ConflictLayer, WeightKind, read_latest_conflict

_TOP_EXPERTS = 3
_DEPTH_GROUPS = 4
_KINDS: dict[WeightKind, str] = {"experts": "experts", "shared": "shared weights"}


def expert_sections(folder: Path, run_dir: Path, found: tuple[int, RoutingLedger] | None) -> list[html.Section]:
    """Draw who uses whom per expert layer that sees the task and, of several tasks, which are alike by it.

    Args:
        folder: receives the pictures.
        run_dir: the run, to name in remedies.
        found: step and ledger of the latest evaluation.
    """
    title = "Which task uses which experts"
    if found is None:
        body = html.missing("no routing ledger", f"`modsquad evaluate {run_dir}` makes one.")
        return [html.Section(title=title, body=body)]
    step, ledger = found
    layers = [layer for layer in ledger.layers if layer.sees_task]
    affinity = task_affinity(ledger)
    if affinity is None:
        no_experts = "This model has no experts."
        all_shared = "All expert layers of this model lie in the shared blocks, which see no task."
        return [html.Section(title=title, body=html.note(all_shared if ledger.layers else no_experts))]

    maps = [
        ExpertMap(
            layer=layer.name,
            share_TE=expert_shares(ledger, layer.name),
            mutual_information=ledger.mutual_information(layer.name),
        )
        for layer in layers
    ]
    caption = (
        f"Share of each task's tokens that chose each expert, on the validation images of step {step:,}. Tasks stand "
        "in one order everywhere, similar users side by side; experts are ordered per layer so that squads show as "
        "blocks. I is the mutual information of tasks and experts in nats."
    )
    top = html.folded(
        f"The {_TOP_EXPERTS} most used experts of every task, layer by layer",
        _top_experts(ledger, layers, affinity.order),
    )
    uses = html.Section(
        title=title, caption=caption, body=_layer_slides(folder, ledger.tasks, affinity.order, maps) + top
    )
    if len(ledger.tasks) < 2:
        return [uses]

    title = "Which tasks are alike"
    affinity_chart(folder / "affinity.png", affinity)
    caption = (
        "Affinity is the share of their choices of experts that two tasks have in common, in percent, averaged over "
        "the layers that see the task: 100 for equal use, 0 for separate experts. The tree joins the most alike first."
    )
    return [uses, html.Section(title=title, caption=caption, body=html.picture(folder / "affinity.png", title))]


def conflict_section(folder: Path, run_dir: Path, found: tuple[int, RoutingLedger] | None) -> html.Section:
    """Draw where the tasks' gradients conflict; the tasks stand as in `expert_sections` where the ledger has them."""
    title = "Where tasks pull against each other"
    record = read_latest_conflict(run_dir)
    if record is None:
        body = html.note(f"Not measured; `modsquad conflict {run_dir}` does it.")
        return html.Section(title=title, body=body)
    affinity = task_affinity(found[1]) if found else None
    order = affinity.order if affinity and affinity.tasks == record.tasks else range(len(record.tasks))
    conflict_curve_chart(folder / "conflict_layers.png", *_curves(record.layers))
    conflict_map_chart(folder / "conflict_maps.png", record.tasks, order, _maps(record.layers))

    headers = ["weights", "number", "mean cosine", "conflicting pairs", "strength of conflict"]
    rows: list[list[html.Cell]] = [
        [name, html.quantity(weights), conflict.mean, html.percent(conflict.share), conflict.strength]
        for name, weights, conflict in summary_rows(record)
    ]
    caption = (
        f"Two tasks conflict where the cosine of their gradients is negative; measured over {record.images:,} training "
        f"images at step {record.step:,}. Strength is the mean size of the negative cosines, 0 for pairs that do not "
        "conflict. Where tasks use different experts their cosine is 0. What runs once per image (patches, shared "
        "blocks) stands for itself; routers and heads of one task are no part of this, as no other task trains them."
    )
    body = (
        html.table(headers, rows, right=headers[1:])
        + html.chart(folder / "conflict_layers.png", "Mean cosine, conflicting pairs and their strength by layer")
        + html.picture(folder / "conflict_maps.png", "Cosine of the gradients of every pair of tasks")
    )
    return html.Section(title=title, caption=caption, body=body)


def _layer_slides(folder: Path, tasks: Sequence[str], order: Sequence[int], maps: Sequence[ExpertMap]) -> str:
    """Draw the maps one by one, under a slider over the layers, and all of them side by side, folded away."""
    slides = []
    for item in maps:
        path = folder / f"experts_{item.layer}.png"
        expert_map_chart(path, tasks, order, [item])
        slides.append((item.layer, html.picture(path, f"{item.layer}: share of each task's tokens per expert")))
    expert_map_chart(folder / "experts.png", tasks, order, maps)
    every = html.picture(folder / "experts.png", "Every layer: share of each task's tokens per expert")
    return html.slides("Layer", slides) + html.folded("All layers side by side", every)


def _top_experts(ledger: RoutingLedger, layers: Sequence[ExpertLayerInfo], order: Sequence[int]) -> str:
    """Tabulate each task's most used experts, a column per layer, with the share of its tokens that chose them."""
    shares = [expert_shares(ledger, layer.name) for layer in layers]
    rows: list[list[html.Cell]] = [
        [ledger.tasks[task], *(html.shares(_most_used(share_TE[task])) for share_TE in shares)] for task in order
    ]
    return html.table(["task", *(layer.name for layer in layers)], rows)


def _most_used(share_E: Floats) -> list[tuple[str, float]]:
    """Return number and share of a few experts, most used first, without those of under half a percent."""
    top = np.argsort(-share_E, kind="stable")[:_TOP_EXPERTS]
    return [(str(expert), float(share_E[expert])) for expert in top if share_E[expert] >= 0.005]


def _curves(layers: Sequence[ConflictLayer]) -> tuple[list[ConflictCurve], int]:
    """Return the curves of the blocks' layers, and how many blocks run once per image."""
    blocks = [layer for layer in layers if layer.block is not None]
    curves = []
    for kind, part in sorted({(layer.kind, layer.part) for layer in blocks}):
        chosen = [layer for layer in blocks if (layer.kind, layer.part) == (kind, part)]
        conflicts = [summarise(np.array(layer.cosine)) for layer in chosen]
        curves.append(
            ConflictCurve(
                kind=kind,
                part=part,
                name=f"{_KINDS[kind]}, {'MLP' if part == 'mlp' else part}",
                block=np.array([layer.block for layer in chosen], dtype=np.float64),
                mean=np.array([conflict.mean for conflict in conflicts]),
                share=np.array([conflict.share for conflict in conflicts]),
                strength=np.array([conflict.strength for conflict in conflicts]),
            )
        )
    return curves, len({layer.block for layer in blocks if not layer.sees_task})


def _maps(layers: Sequence[ConflictLayer]) -> list[list[ConflictMap | None]]:
    """Return the cosines of experts above those of shared weights, for a few groups of consecutive blocks."""
    blocks = sorted({layer.block for layer in layers if layer.block is not None})
    groups = [part.tolist() for part in np.array_split(blocks, min(_DEPTH_GROUPS, len(blocks)))]
    rows: list[list[ConflictMap | None]] = []
    for kind, name in _KINDS.items():
        row: list[ConflictMap | None] = []
        for group in groups:
            chosen = [layer for layer in layers if layer.kind == kind and layer.block in group]
            where = f"block {group[0]}" if len(group) == 1 else f"blocks {group[0]} to {group[-1]}"
            row.append(ConflictMap(title=f"{name}, {where}", cosine_TT=pooled_cosine(chosen)) if chosen else None)
        if any(row):
            rows.append(row)
    return rows
