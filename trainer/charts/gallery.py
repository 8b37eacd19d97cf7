"""Held-out images with ground truth and predictions of every task, drawn as one sheet per image.

Shape legend: B images, P pairs, T tasks, S side in pixels, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from configs.schema import RunConfig
from configs.tasks import TaskSpec
from data_pipeline.loader import EvaluationLoader
from data_pipeline.pictures import colour_range, to_picture
from data_pipeline.run_shards import open_shards
from data_pipeline.targets import Target, prepare_batch
from model.mod_squad import ModSquad
from trainer.charts.figure import INK

Picture = NDArray[np.uint8]

TILE = 192  # pixels; seven of them fill a page, and 64-pixel images scale by a whole number
GAP = 8
COLUMNS = 7
_LABEL = 20
_FONT = ImageFont.load_default(size=13)


@dataclass(frozen=True, kw_only=True)
class TaskPictures:
    """One task on one image; `truth` is None where the image has no label. Pictures are (S, S, 3) uint8."""

    task: str
    truth: Picture | None
    prediction: Picture


@dataclass(frozen=True, kw_only=True)
class RoomPictures:
    """One image, (S, S, 3) uint8, with its tasks."""

    key: str
    rgb: Picture
    tasks: tuple[TaskPictures, ...]


@torch.inference_mode()
def predict_rooms(model: ModSquad, config: RunConfig, count: int) -> list[RoomPictures]:
    """Return the first `count` validation images with the truth and the model's prediction of every task.

    Args:
        model: in eval mode, on the CPU.
        config: names the validation shards, the tasks and the image size.
        count: how many images; fewer where the shards hold fewer.

    Raises:
        UserError: the shards are missing or damaged.
    """
    tasks = config.task_specs
    index = open_shards(config, "val")
    loader = EvaluationLoader(index, tasks, batch_size=1, rank=0, world=1, limit=count, workers=0)
    rooms = []
    try:
        for batch in loader:
            prepared = prepare_batch(batch, tasks, config.data.image_size)
            # Every task is predicted, also those that this image has no label for.
            pair_task = torch.arange(len(tasks))
            predictions = model(prepared.images, torch.zeros_like(pair_task), pair_task).predictions
            drawn = [_draw_task(spec, prepared.targets[spec.name], predictions[spec.name][0]) for spec in tasks]
            rgb = ((prepared.images[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            rooms.append(RoomPictures(key=batch.keys[0], rgb=rgb, tasks=tuple(drawn)))
    finally:
        loader.close()
    return rooms


def _draw_task(spec: TaskSpec, target: Target, prediction: Tensor) -> TaskPictures:
    """Draw one image's truth, where `target` (of at most one pair) has it, and prediction (C, S, S) or (C,)."""
    if not len(target.values):
        return TaskPictures(task=spec.name, truth=None, prediction=to_picture(spec, prediction))
    values, mask = target.values[0], target.mask[0] if spec.dense else None
    colours = colour_range(spec, [(values, mask)])  # the truth's for both, so that a wrong scale shows
    return TaskPictures(
        task=spec.name,
        truth=to_picture(spec, values, mask, value_range=colours),
        prediction=to_picture(spec, prediction, value_range=colours),
    )


def draw_room(path: Path, room: RoomPictures) -> None:
    """Draw the image and, per task, truth above prediction, at most `COLUMNS` tiles a line; writes a PNG."""
    columns = min(COLUMNS, 1 + len(room.tasks))
    rows = math.ceil((1 + len(room.tasks)) / columns)
    row_height = _LABEL + 2 * TILE + 2 * GAP
    sheet = Image.new("RGBA", (columns * (TILE + GAP) - GAP, rows * row_height - GAP))
    draw = ImageDraw.Draw(sheet)

    _text(draw, (0, 0), room.key)
    sheet.paste(_tile(room.rgb), (0, _LABEL))
    _text(draw, (0, _LABEL + TILE + GAP), "above: truth\nbelow: prediction")
    for place, item in enumerate(room.tasks, start=1):
        left, top = place % columns * (TILE + GAP), place // columns * row_height
        _text(draw, (left, top), item.task)
        if item.truth is None:
            _text(draw, (left, top + _LABEL + GAP), "no label")
        else:
            sheet.paste(_tile(item.truth), (left, top + _LABEL))
        sheet.paste(_tile(item.prediction), (left, top + _LABEL + TILE + GAP // 2))
    sheet.save(path, format="PNG", optimize=True)


def _tile(picture: Picture) -> Image.Image:
    """Scale to `TILE`; small pictures keep their pixels visible, since those are what the model sees."""
    image = Image.fromarray(picture)
    small = 2 * image.width <= TILE
    return image.resize((TILE, TILE), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def _text(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    lines: Sequence[str] = text.split("\n")
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * _LABEL), line, fill=INK, font=_FONT)
