"""From stored labels to what losses and metrics compare with predictions, batched on the device.

The mapping of each task follows from its row (`configs.tasks.TaskSpec.target`); constants of the Taskonomy rows are
those of its official configurations. Every dense target comes with a mask: False where the stored value means
"unknown", where the sample's `mask_valid` excludes the pixel (tasks of geometry only), outside the image, and for class
ids outside the table. Values are finite everywhere, so a masked pixel can be multiplied by zero.

Shapes: B images, P pairs, p pairs of one task, C channels of the target, H, W pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.tasks import TargetKind, TaskSpec
from data_pipeline.batch import Batch
from data_pipeline.constants import constant
from data_pipeline.photometric import change_colours
from data_pipeline.transforms import apply_geometry, pair_images, widen

DEPTH_CODES = 2**16
"""log_depth maps the stored code 2^16 - 1 to 1."""


@dataclass(frozen=True)
class Target:
    """Targets of one task's pairs.

    Attributes:
        values: dense (p, C, H, W) float32, class ids (p, H, W) int64, vectors (p, C) float32 that sum to 1.
        mask: bool, True where the target is known: dense (p, 1, H, W), vectors (p, 1).
    """

    values: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Prepared:
    """A micro-batch as the model and the losses take it.

    Attributes:
        images: (B, 3, Z, Z) float32 in [-1, 1].
        targets: task name -> targets of that task's pairs, in pair order; every task of the run has an entry.
        pair_image: (P,) int64, index into `images`; pairs are sorted by (task, image).
        pair_task: (P,) int64, index into the run's tasks.
        global_pairs: (T,) int64, pairs of each task in the whole global batch.
        turns: (B, 2) int64, sample and epoch of each image.
        keys: the B sample keys.
    """

    images: Tensor
    targets: dict[str, Target]
    pair_image: Tensor
    pair_task: Tensor
    global_pairs: Tensor
    turns: Tensor
    keys: tuple[str, ...]


def prepare_batch(batch: Batch, tasks: Sequence[TaskSpec], size: int) -> Prepared:
    """Change geometry and colours as the batch says, resize to `size` pixels and map everything to floats.

    All on the batch's device. Pixels outside the image are 0, the middle of the range, and unknown to all tasks.

    Args:
        batch: a micro-batch as the loader yields it; `tasks` is the order that its `pair_task` counts.
        tasks: the run's tasks.
        size: side of the model's input in pixels.
    """
    batch = apply_geometry(batch, tasks, size)
    targets = {
        spec.name: to_target(
            spec,
            batch.labels[spec.name],
            batch.mask_valid[image],
            None if batch.inside is None else batch.inside[image],
        )
        for spec, image in zip(tasks, pair_images(batch, tasks), strict=True)
    }
    images = prepare_images(change_colours(batch.images, batch.photometric, batch.inside))
    if batch.inside is not None:
        images = images * batch.inside.unsqueeze(1)
    return Prepared(images, targets, batch.pair_image, batch.pair_task, batch.global_pairs, batch.turns, batch.keys)


def prepare_images(images: Tensor) -> Tensor:
    """Map colours from 0 to 255, (B, 3, H, W), to float32 in [-1, 1]: x / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1.0


def depth_metres(spec: TaskSpec, log_depth: Tensor) -> Tensor:
    """Return metres for the target x of `log_depth`, the inverse mapping: (2^(16 x) - 1) / codes_per_metre."""
    return torch.expm1(log_depth * math.log(DEPTH_CODES)) / spec.codes_per_metre


def to_target(spec: TaskSpec, stored: Tensor, mask_valid: Tensor, inside: Tensor | None = None) -> Target:
    """Map stored labels to targets, by the rule that `spec.target` names.

    Args:
        spec: the task's row.
        stored: labels in the task's encoding: dense (p, channels, H, W), vectors (p, C); p may be 0.
        mask_valid: (p, H, W) bool, read only if `spec.uses_mask_valid`.
        inside: (p, H, W) bool, False where nothing is known of any dense task; None: nowhere.
    """
    stored = widen(stored)
    if not spec.dense:
        return Target(_VALUES[spec.target](spec, stored), torch.ones_like(stored[:, :1], dtype=torch.bool))
    mask = _known(spec, stored)
    if spec.uses_mask_valid:
        mask = mask & mask_valid.unsqueeze(1)
    if inside is not None:
        mask = mask & inside.unsqueeze(1)
    values = _VALUES[spec.target](spec, stored)
    if spec.blur_fraction:
        values = blur(values, mask, spec.blur_fraction * values.shape[-2])
    return Target(values, mask)


def blur(values: Tensor, mask: Tensor, sigma: float) -> Tensor:
    """Return the mean of the known neighbours, weighted by a Gaussian of `sigma` pixels.

    Pixels that are masked or outside the image carry no weight (normalised convolution), so neither unknown pixels nor
    the border bleed into the result; it is 0 where nothing known is near.

    Args:
        values: (p, C, H, W) float32.
        mask: (p, 1, H, W) bool.
        sigma: standard deviation in pixels.
    """
    weights = mask.to(values.dtype)
    rows, columns = (_gaussian(length, sigma, values) for length in values.shape[-2:])
    total = rows @ (values * weights) @ columns
    return total / (rows @ weights @ columns).clamp(min=torch.finfo(values.dtype).tiny)


def _gaussian(length: int, sigma: float, like: Tensor) -> Tensor:
    """(length, length) matrix exp(-(i - j)^2 / (2 sigma^2)), cut at four sigma; symmetric, not normalised."""
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    distance = (position[:, None] - position).abs() / sigma
    return torch.where(distance <= 4.0, torch.exp(-0.5 * distance.square()), 0.0)


def _known(spec: TaskSpec, stored: Tensor) -> Tensor:
    """(p, 1, H, W): the stored code is not the one for "unknown", and a class id is one of the table's."""
    if spec.target == "class_ids":
        return (stored < spec.channels) & (stored >= 0)
    if spec.encoding.invalid is None:
        return torch.ones_like(stored[:, :1], dtype=torch.bool)
    return (stored != spec.encoding.invalid).any(1, keepdim=True)


def _log_depth(spec: TaskSpec, stored: Tensor) -> Tensor:
    """log(1 + d) / log(2^16) of the stored code d; computed in float32, since 1 + 65535 wraps in uint16."""
    return torch.log1p(stored.to(torch.float32)) / math.log(DEPTH_CODES)


def _unit_range(spec: TaskSpec, stored: Tensor) -> Tensor:
    """2 v / scale - 1, v at most `scale` if clipped; a label stored with equal channels (reshading) is their mean."""
    values = stored.to(torch.float32)
    if spec.channels == 1:
        values = values.mean(1, keepdim=True)
    if spec.clip:
        values = values.clamp(max=spec.scale)
    return 2.0 * values / spec.scale - 1.0


def _unit_vector(spec: TaskSpec, stored: Tensor) -> Tensor:
    """v / |v| of v = 2 code / 255 - 1; no code maps to 0, so |v| >= sqrt(3) / 255."""
    values = 2.0 * stored.to(torch.float32) / 255.0 - 1.0
    # functional.normalize takes forty times as long on a CPU, over channels that are far apart in memory.
    return values / values.square().sum(1, keepdim=True).sqrt()


def _standardise(spec: TaskSpec, stored: Tensor) -> Tensor:
    """(v - mean) / std of the first `channels` stored channels."""
    values = stored[:, : spec.channels].to(torch.float32)
    mean, std = (constant(row, stored).view(1, -1, 1, 1) for row in (spec.mean, spec.std))
    return (values - mean) / std


def _region_boundary(spec: TaskSpec, stored: Tensor) -> Tensor:
    """1 where a 4-neighbour has another region id, else 0; ids are arbitrary names, only their borders count."""
    vertical = stored[:, :, 1:] != stored[:, :, :-1]
    horizontal = stored[..., 1:] != stored[..., :-1]
    boundary = torch.zeros_like(stored, dtype=torch.bool)
    boundary[:, :, 1:] |= vertical
    boundary[:, :, :-1] |= vertical
    boundary[..., 1:] |= horizontal
    boundary[..., :-1] |= horizontal
    return boundary.to(torch.float32)


def _binary(spec: TaskSpec, stored: Tensor) -> Tensor:
    """1 where the stored value is above half of `scale`."""
    return (stored > spec.scale / 2).to(torch.float32)


def _class_ids(spec: TaskSpec, stored: Tensor) -> Tensor:
    """(p, H, W) int64; 0 where unknown, so that every id can index the classes."""
    return torch.where(_known(spec, stored), stored, 0).squeeze(1).long()


def _class_logits(spec: TaskSpec, stored: Tensor) -> Tensor:
    """softmax(v), in float32."""
    return stored.to(torch.float32).softmax(-1)


def _class_probabilities(spec: TaskSpec, stored: Tensor) -> Tensor:
    """v / sum(v), in float32."""
    values = stored.to(torch.float32)
    return values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


_VALUES: dict[TargetKind, Callable[[TaskSpec, Tensor], Tensor]] = {
    "log_depth": _log_depth,
    "unit_range": _unit_range,
    "unit_vector": _unit_vector,
    "standardise": _standardise,
    "region_boundary": _region_boundary,
    "class_logits": _class_logits,
    "class_probabilities": _class_probabilities,
    "class_ids": _class_ids,
    "binary": _binary,
}
