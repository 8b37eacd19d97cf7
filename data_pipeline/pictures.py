"""Labels and predictions as pictures for reports and contact sheets.

Colour maps are perceptually even and safe for colour-blind readers (cividis, magma, PuOr); pixels that are unknown or
not finite are hatched in grey. VOC classes keep the dataset's own palette, other class tasks take Okabe and Ito's.
"""

from collections.abc import Callable, Iterable
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from configs.tasks import Picture, TaskSpec

FloatArray = NDArray[np.floating[Any]]
Values = torch.Tensor | NDArray[Any]
Range = tuple[float, float]

_BARS_SIDE = 128
_TOP_CLASSES = 5
_HATCH_PIXELS = 6
_SHORTEST_RANGE = 1e-3  # equal values are no reason to divide by nothing
# Curvature targets are standardised: three standard deviations each way.
_SIGNED_RANGE = (-3.0, 3.0)
# Stored curvature is round((0.03 k + 1) / 2 * 254), so 127 means none.
_FLAT_CODE = 127
# Okabe and Ito, "Color universal design" (2008), after black for the background.
_OKABE_ITO = np.array(
    [
        (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
        (204, 121, 167),
    ],
    np.uint8,
)  # fmt: skip


def to_picture(
    spec: TaskSpec,
    values: Values,
    mask: Values | None = None,
    *,
    value_range: Range | None = None,
) -> NDArray[np.uint8]:
    """Draw one target or raw prediction as (H, W, 3) uint8.

    Args:
        spec: the task.
        values: dense (C, H, W) floats in the target's space; normals of any length; class tasks as logits (C, H, W) or
            ids (H, W) or (1, H, W); vectors (C,) as logits or probabilities.
        mask: bool (H, W) or (1, H, W); pixels where it is False are hatched. None: all are known. What is not finite is
            hatched, too; a vector with such an element wholly.
        value_range: values of the ends of the colour map for depths and heat maps, so that several pictures can share
            one (`colour_range`); None: the values' own for depths, the target's for heat maps.
    """
    array = _array(values)
    broken = ~np.isfinite(array)
    if spec.picture == "depth" and value_range is None:
        value_range = colour_range(spec, [(values, mask)])
    picture = _PICTURES[spec.picture](spec, np.where(broken, 0, array), value_range)
    unknown = np.zeros(picture.shape[:2], bool)
    unknown |= broken.reshape(-1, *unknown.shape).any(0) if spec.dense else broken.any()
    if mask is not None:
        unknown |= ~_array(mask).astype(bool).reshape(unknown.shape)
    return np.where(unknown[:, :, None], _hatching(*picture.shape[:2]), picture)


def colour_range(spec: TaskSpec, pictures: Iterable[tuple[Values, Values | None]]) -> Range | None:
    """Return the values of the ends of the colour map that suit several (values, mask) of one task together.

    Depths: the 2nd and 98th percentile over all known pixels. Heat maps of `unit_range` targets: from "nothing" (-1) to
    the 99.5th percentile, as some are faint everywhere. None for every other task: its colours are fixed.
    """
    if spec.picture == "depth":
        low, high = _percentiles(pictures, 2.0, 98.0)
    elif spec.picture == "heat" and spec.target == "unit_range":
        low, high = -1.0, _percentiles(pictures, 99.5)[0]
    else:
        return None
    return low, max(high, low + _SHORTEST_RANGE)


def _percentiles(pictures: Iterable[tuple[Values, Values | None]], *ranks: float) -> list[float]:
    """Return percentiles over all known pixels; zeros if there is none."""
    known = [
        _array(values).ravel() if mask is None else _array(values).ravel()[_array(mask).astype(bool).ravel()]
        for values, mask in pictures
    ]
    pool = np.concatenate([values[np.isfinite(values)] for values in known]) if known else np.empty(0)
    return [float(rank) for rank in np.percentile(pool, ranks)] if pool.size else [0.0] * len(ranks)


def class_palette(spec: TaskSpec) -> NDArray[np.uint8]:
    """Return (classes, 3) uint8: VOC's palette for 21 classes, Okabe and Ito's for up to 8."""
    return _OKABE_ITO[: spec.channels] if spec.channels <= len(_OKABE_ITO) else _voc_palette(spec.channels)


def _array(values: Values) -> NDArray[Any]:
    if not isinstance(values, torch.Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def _depth(spec: TaskSpec, values: FloatArray, value_range: Range | None) -> NDArray[np.uint8]:
    """Near is bright."""
    assert value_range is not None, "to_picture chooses a range for depths"
    return _colours("cividis_r", values[0], value_range)


def _heat(spec: TaskSpec, values: FloatArray, value_range: Range | None) -> NDArray[np.uint8]:
    field = values[0]
    if spec.target == "binary" and (field.min() < 0.0 or field.max() > 1.0):
        field = 1.0 / (1.0 + np.exp(-field.clip(-30.0, 30.0)))
    if value_range is None:
        value_range = (-1.0, 1.0) if spec.target == "unit_range" else (0.0, 1.0)
    return _colours("magma", field, value_range)


def _signed(spec: TaskSpec, values: FloatArray, value_range: Range | None) -> NDArray[np.uint8]:
    """The channels' mean (mean curvature, for principal curvatures), white where the surface is flat."""
    flat = [(_FLAT_CODE - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True)]
    field = (values - np.array(flat).reshape(-1, 1, 1)).mean(axis=0)
    return _colours("PuOr", field, value_range or _SIGNED_RANGE)


def _unit_vectors(spec: TaskSpec, values: FloatArray, value_range: Range | None) -> NDArray[np.uint8]:
    unit = values / np.maximum(np.linalg.norm(values, axis=0, keepdims=True), 1e-6)
    codes: NDArray[np.uint8] = ((unit + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)
    return codes.transpose(1, 2, 0)


def _classes(spec: TaskSpec, values: NDArray[Any], value_range: Range | None) -> NDArray[np.uint8]:
    logits = values.ndim == 3 and len(values) == spec.channels
    ids = values.argmax(axis=0) if logits else values.reshape(values.shape[-2:]).astype(np.int64)
    colours: NDArray[np.uint8] = class_palette(spec)[ids.clip(0, spec.channels - 1)]
    return colours


def _bars(spec: TaskSpec, values: FloatArray, value_range: Range | None) -> NDArray[np.uint8]:
    """The most probable classes as labelled bars, `_BARS_SIDE` pixels square."""
    probabilities = values.astype(np.float64)
    if probabilities.min() < 0.0 or abs(probabilities.sum() - 1.0) > 1e-3:
        probabilities = np.exp(probabilities - probabilities.max())
        probabilities /= probabilities.sum()
    image = Image.new("RGB", (_BARS_SIDE, _BARS_SIDE), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(11)
    height = _BARS_SIDE // _TOP_CLASSES
    for row, index in enumerate(np.argsort(-probabilities, kind="stable")[:_TOP_CLASSES]):
        top = row * height
        draw.rectangle((0, top + 2, probabilities[index] * (_BARS_SIDE - 1), top + height - 3), fill=(86, 180, 233))
        name = spec.class_names[index] if spec.class_names else f"class {index}"
        draw.text((4, top + height / 2), f"{name}  {probabilities[index]:.2f}", fill="black", font=font, anchor="lm")
    return np.asarray(image)


def _colours(name: str, field: FloatArray, value_range: Range) -> NDArray[np.uint8]:
    low, high = value_range
    unit = ((field - low) / (high - low)).clip(0.0, 1.0)
    table = (mpl.colormaps[name](np.linspace(0.0, 1.0, 256))[:, :3] * 255.0).round().astype(np.uint8)
    colours: NDArray[np.uint8] = table[(unit * 255.0).round().astype(np.uint8)]
    return colours


def _hatching(height: int, width: int) -> NDArray[np.uint8]:
    stripe = np.add.outer(np.arange(height), np.arange(width)) // (_HATCH_PIXELS // 2) % 2
    grey: NDArray[np.uint8] = np.where(stripe, 150, 190).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _voc_palette(classes: int) -> NDArray[np.uint8]:
    """The palette of the PASCAL VOC development kit: bit k of (r, g, b) comes from bits 3 (7 - k) of the id."""
    ids = np.arange(classes)
    channels = [sum(((ids >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8)


_PICTURES: dict[Picture, Callable[[TaskSpec, NDArray[Any], Range | None], NDArray[np.uint8]]] = {
    "depth": _depth,
    "rgb_vector": _unit_vectors,
    "signed": _signed,
    "heat": _heat,
    "classes": _classes,
    "bars": _bars,
}
