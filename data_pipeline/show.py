"""A contact sheet of shards: one row per sample, the image and every label as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from configs.atomic import atomic_path
from configs.errors import UserError
from configs.tasks import TaskSpec
from data_pipeline.index import ShardIndex
from data_pipeline.pictures import colour_range, to_picture
from data_pipeline.targets import Target, to_target

_MIN_CELL = 128
_GAP = 6
_TITLE_HEIGHT = 20
_PAPER = (255, 255, 255)
_INK = (40, 40, 40)


def contact_sheet(index: ShardIndex, tasks: Sequence[TaskSpec], count: int, path: Path) -> None:
    """Draw the first `count` samples, and write the picture as PNG.

    Columns are the image and the tasks; what a sample lacks is an empty cell. Depths of one column share their colours.

    Args:
        index: the shards.
        tasks: labels to draw, as columns.
        count: rows; fewer if there are fewer samples.
        path: the PNG to write.

    Raises:
        UserError: a count below 1, a damaged member, or a path that cannot be written.
    """
    if count < 1:
        raise UserError(f"count {count}: give the number of samples to show, 1 or more")
    samples = range(min(count, len(index)))
    images: list[NDArray[np.uint8] | None] = [index.image(sample) for sample in samples]
    columns = [images, *(_column(index, spec, samples) for spec in tasks)]
    sheet = _lay_out(["rgb", *(spec.name for spec in tasks)], columns, max(_MIN_CELL, index.size))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _column(index: ShardIndex, spec: TaskSpec, samples: Sequence[int]) -> list[NDArray[np.uint8] | None]:
    targets = [load_target(index, sample, spec) if index.has(sample, spec.name) else None for sample in samples]
    value_range = colour_range(spec, ((target.values[0], target.mask[0]) for target in targets if target is not None))
    return [
        None
        if target is None
        else to_picture(spec, target.values[0], target.mask[0] if spec.dense else None, value_range=value_range)
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
