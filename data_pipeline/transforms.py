"""Joint geometry of images, masks and labels, batched on the device: crop, zoom, turn, resize and mirror in one step.

What a label does follows from its row of the task table. Ids, depths and normals take the nearest stored value;
images and smooth maps are averaged (`data_pipeline.resampling`). A direction in the image (normals) is mirrored and
turned with it. Every other value stays what it was: depths are not rescaled by a zoom, as is usual, and edges get as
thick as the zoom makes them. A full window at the stored side, neither turned nor mirrored, returns every value
unchanged.

Shapes: B images, P pairs, p pairs of one task, C channels, S stored side, Z output side, all in pixels.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from configs.tasks import TaskSpec
from data_pipeline.batch import Batch
from data_pipeline.constants import constant
from data_pipeline.resampling import Resampling, resampling


def apply_geometry(batch: Batch, tasks: Sequence[TaskSpec], size: int) -> Batch:
    """Return the batch at `size` x `size` pixels, as its `crop`, `rotation` and `flip` say.

    Images, `mask_valid` and the labels of dense tasks stay in stored form, except that uint16 widens to int32, on which
    torch has all operations, and codes of directions that turn become float32. Where `inside` of the result is False
    the pixel shows nothing: its `mask_valid` is False, its label means nothing. `flip`, `crop` and `rotation` of the
    result are neutral: applying it again changes nothing.

    Args:
        batch: stored side S, on any device.
        tasks: the run's tasks, in the order that `batch.pair_task` counts.
        size: output side Z in pixels.
    """
    stored = batch.images.shape[-1]
    sampling = resampling(batch.crop, batch.flip, batch.rotation, stored, size)
    labels = dict(batch.labels)
    for spec, image in zip(tasks, pair_images(batch, tasks), strict=True):
        if spec.dense:
            known = batch.mask_valid[image].unsqueeze(1) if spec.uses_mask_valid else None
            label = _resample_label(spec, widen(labels[spec.name]), known, sampling.of_images(image))
            rotation = None if batch.rotation is None else batch.rotation[image]
            labels[spec.name] = _turn_values(spec, label, rotation, batch.flip[image])
    inside = _inside(batch, sampling)
    mask_valid = sampling.nearest(batch.mask_valid.unsqueeze(1)).squeeze(1)
    return replace(
        batch,
        images=sampling.average(batch.images, None),
        mask_valid=mask_valid if inside is None else mask_valid & inside,
        labels=labels,
        flip=torch.zeros_like(batch.flip),
        crop=constant([0.0, 0.0, 1.0, 1.0], batch.crop).expand_as(batch.crop),
        rotation=None,
        inside=inside,
    )


def pair_images(batch: Batch, tasks: Sequence[TaskSpec]) -> tuple[Tensor, ...]:
    """Return, per task, the image index (p,) of each of its pairs.

    Pairs are sorted by task, so the lengths of the labels cut `pair_image` without asking the device anything.
    """
    return torch.split(batch.pair_image, [len(batch.labels[spec.name]) for spec in tasks])


def widen(stored: Tensor) -> Tensor:
    """Return a stored label in a dtype that torch computes with: uint16 becomes int32, others stay."""
    return stored.to(torch.int32) if stored.dtype == torch.uint16 else stored


def _resample_label(spec: TaskSpec, label: Tensor, known: Tensor | None, sampling: Resampling) -> Tensor:
    if spec.interpolation != "bilinear":
        return sampling.nearest(label)
    assert spec.encoding.invalid is None, f"{spec.name}: a value that means 'unknown' must not be averaged"
    return sampling.average(label, known)


def _inside(batch: Batch, sampling: Resampling) -> Tensor | None:
    """Pixels of the result that show something: in the window's image, and shown there before."""
    inside = sampling.inside(batch.images.shape[-1])
    if batch.inside is None:
        return inside
    before = sampling.nearest(batch.inside.unsqueeze(1)).squeeze(1)
    return before if inside is None else before & inside


def _turn_values(spec: TaskSpec, label: Tensor, rotation: Tensor | None, flip: Tensor) -> Tensor:
    """Turn and then mirror stored directions: x is right and y down (or x left and y up), v = code / 127.5 - 1.

    Mirroring makes the code v of x 255 - v, exactly. Turning anticlockwise, as seen, takes (x, y) to
    (x cos + y sin, y cos - x sin); codes are not rounded then, which would cost up to 0.3 degrees.
    """
    if not spec.oriented:
        return label
    x, y, rest = label[:, :1], label[:, 1:2], label[:, 2:]
    if rotation is not None:
        cosine, sine = rotation.cos()[:, None, None, None], rotation.sin()[:, None, None, None]
        right, down = x.to(torch.float32) - 127.5, y.to(torch.float32) - 127.5
        x, y, rest = right * cosine + down * sine + 127.5, down * cosine - right * sine + 127.5, rest.to(torch.float32)
    x = torch.where(flip[:, None, None, None], 255 - x, x)
    turned = torch.cat([x, y, rest], dim=1)
    if spec.encoding.invalid is None:
        return turned
    known = (label != spec.encoding.invalid).any(1, keepdim=True)
    return torch.where(known, turned, label.to(turned.dtype))
