"""A contact sheet of shards: one row per sample, the image and every label as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from configs.atomic import atomic_path
from configs.errors import UserError
from configs.tasks import TaskSpec
from data_pipeline.draws import Augment
from data_pipeline.index import ShardIndex
from data_pipeline.pictures import colour_range, to_picture
from data_pipeline.planning.plan import Slot
from data_pipeline.reading import read_batch
from data_pipeline.targets import Prepared, Target, prepare_batch, to_target

_MIN_CELL = 128
_GAP = 6
_TITLE_HEIGHT = 20
_PAPER = (255, 255, 255)
_INK = (40, 40, 40)


def contact_sheet(
    index: ShardIndex, tasks: Sequence[TaskSpec], count: int, path: Path, augment: Augment | None = None
) -> None:
    """Draw the first `count` samples, and write the picture as PNG.

    Columns are the image and the tasks; what a sample lacks is an empty cell. Depths of one column share their colours.

    Args:
        index: the shards.
        tasks: labels to draw, as columns.
        count: rows; fewer if there are fewer samples.
        path: the PNG to write.
        augment: show the samples as training sees them in the first epoch, at the stored size; None: as they are.

    Raises:
        UserError: a count below 1, a damaged member, or a path that cannot be written.
    """
    if count < 1:
        raise UserError(f"count {count}: give the number of samples to show, 1 or more")
    rows = [_prepare(index, tasks, sample, augment) for sample in range(min(count, len(index)))]
    images: list[NDArray[np.uint8] | None] = [_image(row.images[0]) for row in rows]
    columns = [images, *(_column(spec, [row.targets[spec.name] for row in rows]) for spec in tasks)]
    sheet = _lay_out(["rgb", *(spec.name for spec in tasks)], columns, max(_MIN_CELL, index.size))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _prepare(index: ShardIndex, tasks: Sequence[TaskSpec], sample: int, augment: Augment | None) -> Prepared:
    """Read one sample with all its labels, by the way that training takes."""
    served = tuple(number for number, spec in enumerate(tasks) if index.has(sample, spec.name))
    pairs = np.array([number in served for number in range(len(tasks))], np.int64)
    return prepare_batch(read_batch(index, tasks, [Slot(sample, served, 0)], pairs, augment), tasks, index.size)


def _image(image: Tensor) -> NDArray[np.uint8]:
    """(3, S, S) in [-1, 1] as (S, S, 3) bytes."""
    codes: NDArray[np.uint8] = ((image + 1.0) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return codes


def _column(spec: TaskSpec, targets: Sequence[Target]) -> list[NDArray[np.uint8] | None]:
    """One picture per sample, None where `targets` has no pair."""
    present = [(target.values[0], target.mask[0]) for target in targets if len(target.values)]
    value_range = colour_range(spec, present)
    return [
        to_picture(spec, target.values[0], target.mask[0] if spec.dense else None, value_range=value_range)
        if len(target.values)
        else None
        for target in targets
    ]


def load_target(index: ShardIndex, sample: int, spec: TaskSpec) -> Target:
    """Read one label and map it to its target, at the stored size; a batch of one pair.

    Raises:
        UserError: no such label, or a damaged member.
    """
    stored = index.label(sample, spec)
    if spec.dense:
        stored = np.moveaxis(stored.reshape(*stored.shape[:2], -1), 2, 0)
    mask_valid = torch.from_numpy(index.mask_valid(sample))
    return to_target(spec, torch.from_numpy(np.array(stored))[None], mask_valid[None])


def _lay_out(titles: Sequence[str], columns: Sequence[Sequence[NDArray[np.uint8] | None]], cell: int) -> Image.Image:
    rows = len(columns[0])
    width = len(columns) * (cell + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _TITLE_HEIGHT + rows * (cell + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for column, (title, pictures) in enumerate(zip(titles, columns, strict=True)):
        left = _GAP + column * (cell + _GAP)
        draw.text((left + cell / 2, _GAP + _TITLE_HEIGHT / 2), title, fill=_INK, font=font, anchor="mm")
        for row, picture in enumerate(pictures):
            top = _GAP + _TITLE_HEIGHT + row * (cell + _GAP)
            if picture is None:
                draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline=(200, 200, 200))
                draw.text((left + cell / 2, top + cell / 2), "no label", fill=_INK, font=font, anchor="mm")
            else:
                sheet.paste(Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST), (left, top))
    return sheet
