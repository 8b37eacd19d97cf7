"""Joint geometry of images, masks and labels, batched on the device: crop, resize and mirror in one resampling.

Every output pixel reads the source once, so a crop that is mirrored and resized is not resampled three times. Ids,
depths and normals take the nearest stored value, exactly; images and smooth maps are averaged with a triangle filter
(anti-aliased when shrinking) whose two axes are matrix products. No branch depends on device data, so nothing waits
for the device; a full crop at the stored side without mirroring returns every value unchanged.

Shapes: B images, P pairs, p pairs of one task, C channels, S stored side, Z output side, all in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.tasks import TaskSpec
from data_pipeline.batch import Batch


@dataclass(frozen=True)
class _Sampling:
    """Where each output pixel of each image reads the source.

    Attributes:
        rows, columns: (B, Z) int64, the nearest source pixel.
        row_weights, column_weights: (B, Z, S) float32, the triangle filter over source pixels; rows sum to 1.
    """

    rows: Tensor
    columns: Tensor
    row_weights: Tensor
    column_weights: Tensor

    def of_images(self, image: Tensor) -> "_Sampling":
        """Return the sampling of the images `image` (p,), one row each."""
        return _Sampling(*(value[image] for value in vars(self).values()))


def apply_geometry(batch: Batch, tasks: Sequence[TaskSpec], size: int) -> Batch:
    """Return the batch cropped, resized to `size` x `size` and mirrored as its `crop` and `flip` say.

    Images, `mask_valid` and the labels of dense tasks stay in stored form, except that uint16 widens to int32, on which
    torch has all operations. `flip` and `crop` of the result are neutral: applying it again changes nothing.

    Args:
        batch: stored side S, on any device.
        tasks: the run's tasks, in the order that `batch.pair_task` counts.
        size: output side Z in pixels.
    """
    stored = batch.images.shape[-1]
    sampling = _sampling(batch.crop, batch.flip, stored, size)
    labels = dict(batch.labels)
    for spec, image in zip(tasks, pair_images(batch, tasks), strict=True):
        if spec.dense:
            known = batch.mask_valid[image].unsqueeze(1) if spec.uses_mask_valid else None
            label = _resample_label(spec, widen(labels[spec.name]), known, sampling.of_images(image))
            labels[spec.name] = _mirror_values(spec, label, batch.flip[image])
    return replace(
        batch,
        images=_average(batch.images, None, sampling),
        mask_valid=_nearest(batch.mask_valid.unsqueeze(1), sampling).squeeze(1),
        labels=labels,
        flip=torch.zeros_like(batch.flip),
        crop=torch.tensor([0.0, 0.0, 1.0, 1.0], device=batch.crop.device).expand_as(batch.crop),
    )


def pair_images(batch: Batch, tasks: Sequence[TaskSpec]) -> tuple[Tensor, ...]:
    """Return, per task, the image index (p,) of each of its pairs.

    Pairs are sorted by task, so the lengths of the labels cut `pair_image` without asking the device anything.
    """
    return torch.split(batch.pair_image, [len(batch.labels[spec.name]) for spec in tasks])


def widen(stored: Tensor) -> Tensor:
    """Return a stored label in a dtype that torch computes with: uint16 becomes int32, others stay."""
    return stored.to(torch.int32) if stored.dtype == torch.uint16 else stored


def _sampling(crop: Tensor, flip: Tensor, stored: int, size: int) -> _Sampling:
    # float64: at 512 pixels a float32 coordinate is off by 3e-5 pixels, which moves large uint16 values by whole units.
    top, left, height, width = crop.to(torch.float64).unbind(1)
    unit = (torch.arange(size, device=crop.device, dtype=torch.float64) + 0.5) / size
    mirrored = torch.where(flip[:, None], unit.flip(0), unit)
    rows = (top[:, None] + unit * height[:, None]) * stored
    columns = (left[:, None] + mirrored * width[:, None]) * stored
    return _Sampling(
        _pixel_of(rows, stored),
        _pixel_of(columns, stored),
        _triangle_weights(rows, height * (stored / size), stored),
        _triangle_weights(columns, width * (stored / size), stored),
    )


def _pixel_of(coordinate: Tensor, stored: int) -> Tensor:
    """Pixel i covers [i, i + 1)."""
    return coordinate.floor().long().clamp(0, stored - 1)


def _triangle_weights(coordinate: Tensor, step: Tensor, stored: int) -> Tensor:
    """(B, Z, S) weights max(0, 1 - |x - centre| / radius) with radius max(1, `step`), normalised over the image.

    `step` (B,) is the distance of neighbouring output pixels in source pixels: radius 1 is bilinear interpolation, a
    larger one averages what an output pixel covers.
    """
    centre = torch.arange(stored, device=coordinate.device, dtype=torch.float64) + 0.5
    distance = (coordinate[:, :, None] - centre).abs()
    weights = (1.0 - distance / step.clamp(min=1.0)[:, None, None]).clamp(min=0.0)
    return (weights / weights.sum(-1, keepdim=True)).to(torch.float32)


def _resample_label(spec: TaskSpec, label: Tensor, known: Tensor | None, sampling: _Sampling) -> Tensor:
    if spec.interpolation != "bilinear":
        return _nearest(label, sampling)
    assert spec.encoding.invalid is None, f"{spec.name}: a value that means 'unknown' must not be averaged"
    return _average(label, known, sampling)


def _nearest(source: Tensor, sampling: _Sampling) -> Tensor:
    """(p, C, S, S) -> (p, C, Z, Z), every value one of the source's."""
    count, channels = source.shape[:2]
    item = torch.arange(count, device=source.device)[:, None, None, None]
    channel = torch.arange(channels, device=source.device)[None, :, None, None]
    return source[item, channel, sampling.rows[:, None, :, None], sampling.columns[:, None, None, :]]


def _average(source: Tensor, known: Tensor | None, sampling: _Sampling) -> Tensor:
    """(p, C, S, S) -> (p, C, Z, Z) weighted means over the `known` (p, 1, S, S) pixels, rounded to the source's dtype.

    An output pixel whose nearest source pixel is known always has a positive weight, so the mean exists wherever the
    resampled mask is True; elsewhere the result is 0.
    """
    values = source.to(torch.float32)
    if known is None:
        mean = _weigh(values, sampling)
    else:
        share = _weigh(known.to(torch.float32), sampling)
        mean = _weigh(values * known, sampling) / share.clamp(min=torch.finfo(torch.float32).tiny)
    return mean if source.is_floating_point() else mean.round().to(source.dtype)


def _weigh(values: Tensor, sampling: _Sampling) -> Tensor:
    return sampling.row_weights[:, None] @ values @ sampling.column_weights[:, None].mT


def _mirror_values(spec: TaskSpec, label: Tensor, flip: Tensor) -> Tensor:
    """Negate x of stored normals where mirrored: the code v of x = 2 v / 255 - 1 becomes 255 - v, exactly."""
    if not spec.negates_x_on_flip:
        return label
    negate = flip[:, None, None, None]
    if spec.encoding.invalid is not None:
        negate = negate & (label != spec.encoding.invalid).any(1, keepdim=True)
    return torch.cat([torch.where(negate, 255 - label[:, :1], label[:, :1]), label[:, 1:]], dim=1)
