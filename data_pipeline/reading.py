"""From slots to batches: read the members that are needed and decode them into the batch's own memory, as stored."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import UserError
from configs.tasks import TaskSpec
from data_pipeline.batch import Batch
from data_pipeline.block import Shape, allocate
from data_pipeline.draws import Augment, draw_augmentations
from data_pipeline.planning.plan import Slot
from data_pipeline.sample import AnyArray
from data_pipeline.shards import ShardIndex

_IMAGES, _MASKS = "images", "mask_valid"


def read_batch(
    index: ShardIndex,
    tasks: Sequence[TaskSpec],
    slots: Sequence[Slot],
    global_pairs: NDArray[np.int64],
    augment: Augment | None,
    *,
    shared: bool = False,
) -> Batch:
    """Read one micro-batch, whose images, masks and labels lie in one block of memory.

    Args:
        index: the shards.
        tasks: the run's T tasks.
        slots: images and the tasks each serves; may be empty.
        global_pairs: (T,) pairs of each task in the global batch.
        augment: None: images as they are.
        shared: whether that block is shared memory.

    Raises:
        UserError: a member is damaged, has the wrong bit depth, or the wrong size; or there is too little shared
            memory.
    """
    pairs = sorted((task, row) for row, slot in enumerate(slots) for task in slot.tasks)
    pixels = _allocate(index.size, tasks, len(slots), Counter(task for task, _ in pairs), shared=shared)
    arrays: dict[str, AnyArray] = {name: tensor.numpy() for name, tensor in pixels.items()}
    images, masks = arrays[_IMAGES], arrays[_MASKS]
    for row, slot in enumerate(slots):
        images[row] = index.image(slot.sample).transpose(2, 0, 1)
        masks[row] = index.mask_valid(slot.sample)
    drawn = draw_augmentations(augment, [(slot.epoch, slot.sample) for slot in slots])
    filled: Counter[int] = Counter()
    for task, row in pairs:
        label = index.label(slots[row].sample, tasks[task])
        arrays[tasks[task].name][filled[task]] = label.transpose(2, 0, 1) if label.ndim == 3 else label
        filled[task] += 1
    return Batch(
        images=pixels[_IMAGES],
        mask_valid=pixels[_MASKS],
        pair_image=torch.tensor([row for _, row in pairs], dtype=torch.int64),
        pair_task=torch.tensor([task for task, _ in pairs], dtype=torch.int64),
        labels={spec.name: pixels[spec.name] for spec in tasks},
        global_pairs=torch.from_numpy(global_pairs),
        flip=drawn.flip,
        crop=drawn.crop,
        rotation=drawn.rotation,
        photometric=drawn.photometric,
        turns=torch.tensor([(slot.sample, slot.epoch) for slot in slots], dtype=torch.int64).view(-1, 2),
        keys=tuple(index.keys[slot.sample] for slot in slots),
    )


def _allocate(
    side: int, tasks: Sequence[TaskSpec], images: int, pairs: Counter[int], *, shared: bool
) -> dict[str, torch.Tensor]:
    """Return the block's tensors: images (B, 3, S, S), masks (B, S, S), labels of tasks (p, C, S, S) or (p, C)."""
    arrays: dict[str, tuple[Shape, torch.dtype]] = {
        _IMAGES: ((images, 3, side, side), torch.uint8),
        _MASKS: ((images, side, side), torch.bool),
    }
    for number, spec in enumerate(tasks):
        shape = (pairs[number], spec.encoding.channels, *((side, side) if spec.dense else ()))
        arrays[spec.name] = shape, getattr(torch, spec.encoding.dtype)
    try:
        return allocate(arrays, shared=shared)
    except RuntimeError as error:
        if not shared:
            raise
        raise UserError(
            f"no shared memory for a batch of {images} images ({error}): make /dev/shm larger (docker run "
            "--shm-size), or lower train.micro_batch or data.workers; 0 workers need none"
        ) from None
