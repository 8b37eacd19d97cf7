"""`modsquad conflict`: where the gradients of tasks point against each other, in experts and in shared weights.

Tasks s and t conflict in a set of weights where the cosine of their gradients is negative (PCGrad, arXiv 2001.06782,
definition 1):

    cos(s, t) = <g_s, g_t> / (|g_s| |g_t|)        g_t: gradient of the mean loss of task t's pairs over all images

Compared are the weights that all tasks train; heads, task embeddings and routers that serve one task are none of them.
A task without any gradient in a set has no direction there: its cosines are unknown (NaN) and count nowhere. Gradients
of tasks that use different experts have disjoint support: their cosine is exactly 0, neither conflict nor agreement.
Losses are unweighted, as a positive task weight changes no cosine.

Shape legend: T tasks, W weights of a group.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.atomic import write_text_atomically
from configs.errors import UserError
from data_pipeline.loader import EvaluationLoader
from data_pipeline.run_shards import open_shards
from data_pipeline.targets import Prepared, prepare_batch
from model.mod_squad import ModSquad
from model.vit import ExpertLayer
from trainer.losses import pair_losses
from trainer.run_files import ConflictLayer, ConflictRecord, Part, WeightKind, conflict_path
from trainer.squads.export import available_device, load_run_model

GRADIENT_BYTES = 2 * 2**30
"""Memory for the gradients of all tasks at once. A model that needs more is measured in several passes over the images,
some of its layers in each: with 13 tasks two for the published small model, six for base."""
_CHUNK = 2**20  # weights


@dataclass(frozen=True, kw_only=True)
class WeightGroup:
    """Weights of one layer that all tasks train; the fields before them are those of `ConflictLayer`."""

    block: int | None
    part: Part
    kind: WeightKind
    sees_task: bool
    parameters: tuple[nn.Parameter, ...]

    @property
    def numel(self) -> int:
        """Return W."""
        return sum(parameter.numel() for parameter in self.parameters)


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """The pairs of tasks in one number each; NaN where no cosine is known.

    Attributes:
        mean: mean cosine over the pairs.
        share: share of the pairs whose cosine is negative.
        strength: mean over the pairs of -cosine where it is negative, and 0 where it is not: unlike `share` it tells
            a faint conflict from a strong one.
    """

    mean: float
    share: float
    strength: float


def measure_run(run_dir: Path, images: int) -> ConflictRecord:
    """Measure the latest checkpoint of a run, write RUN/conflict/step_XXXXXXXX.json and return its content.

    Args:
        run_dir: a run with a checkpoint, finished or not.
        images: training images to measure on, from the start of the index, each with all its labels, neither cropped
            nor flipped. More images leave less noise in the gradients, and noise pulls cosines towards 0.

    Raises:
        UserError: no run, no checkpoint or no shards, a run of one task, or a file that cannot be written.
    """
    device = available_device()
    model, config, step = load_run_model(run_dir, device)
    if len(model.tasks) < 2:
        raise UserError(f"{run_dir} was trained on one task only: gradients of two are needed for a conflict")
    index = open_shards(config, "train")

    def batches() -> Iterator[Prepared]:
        loader = EvaluationLoader(
            index,
            model.tasks,
            batch_size=config.evaluate.batch_size,
            rank=0,
            world=1,
            limit=images,
            workers=config.data.workers,
        )
        try:
            for batch in loader:
                yield prepare_batch(batch.to(device), model.tasks, model.image_size)
        finally:
            loader.close()

    record = ConflictRecord(
        step=step,
        images=min(images, len(index)),
        tasks=tuple(spec.name for spec in model.tasks),
        layers=tuple(measure(model, batches)),
    )
    # pydantic writes null for NaN, which the reader takes back as NaN.
    write_text_atomically(conflict_path(run_dir, step), record.model_dump_json() + "\n")
    return record


def measure(
    model: ModSquad, batches: Callable[[], Iterator[Prepared]], *, gradient_bytes: int = GRADIENT_BYTES
) -> list[ConflictLayer]:
    """Return the cosines of the tasks' gradients in every group of `weight_groups`.

    Args:
        model: in eval mode; its gradients are left alone.
        batches: called once per pass, yields the same micro-batches each time, on the model's device.
        gradient_bytes: how much the gradients of one pass may take; a single group may take more.
    """
    layers = []
    for groups in _passes(weight_groups(model), gradient_bytes // (4 * len(model.tasks))):
        gradients = task_gradients(model, groups, batches())
        layers += [_compare(group, gradient_TW) for group, gradient_TW in zip(groups, gradients, strict=True)]
    return layers


def weight_groups(model: ModSquad) -> list[WeightGroup]:
    """Return the backbone's weights that all tasks train, from the patches up: per part of a block, experts first."""
    backbone = model.backbone
    stem = (*backbone.patch.parameters(), backbone.position)
    parts: list[tuple[Part, str]] = [("attention", "norm1"), ("mlp", "norm2")]
    groups = [WeightGroup(block=None, part="patches", kind="shared", sees_task=False, parameters=stem)]
    for number, block in enumerate(backbone.blocks):
        for part, norm in parts:
            module = block.get_submodule(part)
            own = set()
            if isinstance(module, ExpertLayer) and len(module.router.weight) > 1:
                own = set(module.router.parameters())
            parameters = [*block.get_submodule(norm).parameters(), *(x for x in module.parameters() if x not in own)]
            experts = tuple(x for x in parameters if hasattr(x, "is_expert"))
            shared = tuple(x for x in parameters if not hasattr(x, "is_expert"))
            kinds: list[tuple[WeightKind, tuple[nn.Parameter, ...]]] = [("experts", experts), ("shared", shared)]
            groups += [
                WeightGroup(
                    block=number,
                    part=part,
                    kind=kind,
                    sees_task=number >= model.config.shared_blocks,
                    parameters=members,
                )
                for kind, members in kinds
                if members
            ]
    return groups


def task_gradients(model: ModSquad, groups: Sequence[WeightGroup], batches: Iterator[Prepared]) -> list[Tensor]:
    """Return, per group, the gradients of every task's mean loss over the pairs of all batches, (T, W) float32."""
    parameters = [parameter for group in groups for parameter in group.parameters]
    sums = [parameters[0].new_zeros(len(model.tasks), group.numel) for group in groups]
    pairs_T = parameters[0].new_zeros(len(model.tasks))
    for prepared in batches:
        for task, spec in enumerate(model.tasks):
            own = prepared.pair_task == task
            if not own.any():
                continue
            # One task at a time: a backward pass through the pairs of all would cost T times as much.
            output = model(prepared.images, prepared.pair_image[own], prepared.pair_task[own])
            loss = pair_losses(spec, output.predictions[spec.name], prepared.targets[spec.name]).sum()
            found = iter(torch.autograd.grad(loss, parameters, materialize_grads=True))
            for group, sum_TW in zip(groups, sums, strict=True):
                sum_TW[task] += torch.cat([next(found).flatten() for _ in group.parameters])
            pairs_T[task] += own.sum()
    return [sum_TW.div_(pairs_T.clamp_min(1)[:, None]) for sum_TW in sums]


def pooled_cosine(layers: Sequence[ConflictLayer]) -> NDArray[np.float64]:
    """Return the cosines (T, T) over the weights of several layers together.

    Exactly those of the concatenated gradients, whose inner products are the sums of the layers'.
    """
    gram_TT = sum(np.nan_to_num(np.array(layer.cosine)) * np.outer(layer.norms, layer.norms) for layer in layers)
    return _cosine(np.asarray(gram_TT))


def summarise(cosine_TT: NDArray[np.float64]) -> Conflict:
    """Return the numbers of `Conflict` over the pairs of different tasks whose cosine is known."""
    pairs = cosine_TT[np.triu_indices(len(cosine_TT), k=1)]
    known = pairs[np.isfinite(pairs)]
    if not len(known):
        return Conflict(mean=math.nan, share=math.nan, strength=math.nan)
    negative = known.clip(max=0.0)
    return Conflict(mean=float(known.mean()), share=float((negative < 0).mean()), strength=float(abs(negative).mean()))


def summary_rows(record: ConflictRecord) -> list[tuple[str, int, Conflict]]:
    """Return name, number of weights and conflict of each kind of weights that the model has, pooled over its layers.

    What runs once per image, patches and shared blocks, is one kind: all tasks train it by the same tokens.
    """
    tasks_apart = [layer for layer in record.layers if layer.sees_task]
    kinds = {
        "experts": [layer for layer in tasks_apart if layer.kind == "experts"],
        "shared weights": [layer for layer in tasks_apart if layer.kind == "shared"],
        "run once per image": [layer for layer in record.layers if not layer.sees_task],
    }
    return [
        (name, sum(layer.weights for layer in layers), summarise(pooled_cosine(layers)))
        for name, layers in kinds.items()
        if layers
    ]


def _passes(groups: Sequence[WeightGroup], weights: int) -> Iterator[list[WeightGroup]]:
    """Cut `groups` into runs of at most so many weights, or of one group."""
    run: list[WeightGroup] = []
    for group in groups:
        if run and sum(member.numel for member in run) + group.numel > weights:
            yield run
            run = []
        run.append(group)
    yield run


def _compare(group: WeightGroup, gradient_TW: Tensor) -> ConflictLayer:
    # Sums of millions of products, float64 as they are to be exact; in chunks, for a copy of all would double memory.
    chunks = (chunk_TW.double() for chunk_TW in torch.split(gradient_TW, _CHUNK, dim=1))
    gram_TT = torch.stack([chunk_TW @ chunk_TW.T for chunk_TW in chunks]).sum(0).cpu().numpy()
    return ConflictLayer(
        block=group.block,
        part=group.part,
        kind=group.kind,
        sees_task=group.sees_task,
        weights=group.numel,
        norms=tuple(np.sqrt(np.diag(gram_TT)).tolist()),
        cosine=tuple(map(tuple, _cosine(gram_TT).tolist())),
    )


def _cosine(gram_TT: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return <s, t> / (|s| |t|) from the inner products, NaN where one is 0."""
    norm_T = np.sqrt(np.diag(gram_TT))
    cosine_TT = np.full_like(gram_TT, np.nan)
    np.divide(gram_TT, np.outer(norm_T, norm_T), out=cosine_TT, where=np.outer(norm_T, norm_T) > 0)
    return cosine_TT.clip(-1, 1)
