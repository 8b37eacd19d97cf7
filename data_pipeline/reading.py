"""From slots to batches: read the members that are needed, decode them, stack them in stored form."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.tasks import TaskSpec
from data_pipeline.batch import Batch
from data_pipeline.draws import Augment, draw_augmentations
from data_pipeline.plan import Slot
from data_pipeline.sample import AnyArray
from data_pipeline.shards import ShardIndex


def read_batch(
    index: ShardIndex,
    tasks: Sequence[TaskSpec],
    slots: Sequence[Slot],
    global_pairs: NDArray[np.int64],
    augment: Augment | None,
) -> Batch:
    """Read one micro-batch.

    Args:
        index: the shards.
        tasks: the run's T tasks.
        slots: images and the tasks each serves; may be empty.
        global_pairs: (T,) pairs of each task in the global batch.
        augment: None: images as they are.

    Raises:
        UserError: a member is damaged, has the wrong bit depth, or the wrong size.
    """
    images = np.zeros((len(slots), 3, index.size, index.size), np.uint8)
    masks = np.ones((len(slots), index.size, index.size), np.bool_)
    for row, slot in enumerate(slots):
        images[row] = index.image(slot.sample).transpose(2, 0, 1)
        masks[row] = index.mask_valid(slot.sample)
    drawn = draw_augmentations(augment, [(slot.epoch, slot.sample) for slot in slots])
    pairs = sorted((task, row) for row, slot in enumerate(slots) for task in slot.tasks)
    return Batch(
        images=torch.from_numpy(images),
        mask_valid=torch.from_numpy(masks),
        pair_image=torch.tensor([row for _, row in pairs], dtype=torch.int64),
        pair_task=torch.tensor([task for task, _ in pairs], dtype=torch.int64),
        labels={
            spec.name: _read_labels(index, spec, [slots[row].sample for task, row in pairs if task == number])
            for number, spec in enumerate(tasks)
        },
        global_pairs=torch.from_numpy(global_pairs),
        flip=drawn.flip,
        crop=drawn.crop,
        rotation=drawn.rotation,
        photometric=drawn.photometric,
        keys=tuple(index.keys[slot.sample] for slot in slots),
    )


def _read_labels(index: ShardIndex, spec: TaskSpec, samples: Sequence[int]) -> Tensor:
    """Return the stored labels of `samples`: dense (p, C, S, S), vectors (p, C)."""
    channels = spec.encoding.channels
    shape = (channels, index.size, index.size) if spec.dense else (channels,)
    stacked: AnyArray = np.empty((len(samples), *shape), spec.encoding.dtype)
    for row, sample in enumerate(samples):
        label = index.label(sample, spec)
        stacked[row] = label.transpose(2, 0, 1) if label.ndim == 3 else label
    return torch.from_numpy(stacked)
