"""The embedded dataset's entrance: a room by number."""

from collections.abc import Sequence
from random import Random

import numpy as np

from configs.errors import UserError
from configs.tasks import TASKS, resolve_tasks
from data_pipeline.rooms import labels_pascal, labels_taskonomy
from data_pipeline.rooms.render import render
from data_pipeline.rooms.scene_types import furnish
from data_pipeline.rooms.viewpoint import choose_camera
from data_pipeline.sample import Sample

SMALLEST, LARGEST = 32, 512
VERSION = 1
"""Goes up with every change of what a room, its picture or its labels look like, so that no folder mixes two."""
_LABELS = {**labels_taskonomy.LABELS, **labels_pascal.LABELS}


def make_room(seed: int, index: int, size: int, tasks: Sequence[str] | None = None) -> Sample:
    """Room number `index` of the dataset with a seed, with the labels of some tasks (None: all).

    The same arguments give the same bytes in any process on machines of the same kind. The room and the camera do not
    depend on `size`; what lies in the picture is the same at all sizes.

    Returns:
        A sample of size x size pixels whose labels are in the stored encodings of `configs.tasks`; `mask_valid` is 0
        on window panes. `meta` holds the dataset (`rooms`), seed, index, scene type and focal length in pixels.

    Raises:
        UserError: a size outside 32..512, a negative seed or index, or an unknown task.
    """
    if not SMALLEST <= size <= LARGEST:
        raise UserError(f"rooms are {SMALLEST} to {LARGEST} pixels wide, not {size}: give a size in that range")
    if seed < 0 or index < 0:
        raise UserError(f"room seed {seed}, index {index}: both must be 0 or more")
    names = [spec.name for spec in resolve_tasks(tuple(TASKS) if tasks is None else tuple(tasks))]
    rng = Random(f"rooms/{seed}/{index}")
    room = furnish(rng)
    solids = room.scene.freeze()
    camera = choose_camera(room, solids, rng)
    view = render(room, solids, camera, size, np.random.default_rng((seed, index, size)))
    return Sample(
        key=f"room_{index:06d}",
        rgb=view.rgb,
        labels={name: _LABELS[name](view) for name in names},
        mask_valid=np.where(view.valid, np.uint8(255), np.uint8(0)),
        meta={
            "dataset": "rooms",
            "seed": seed,
            "index": index,
            "scene_type": room.scene_type,
            "focal_pixels": round(view.focal_pixels, 4),
        },
    )
