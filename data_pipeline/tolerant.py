"""Micro-batches without what is damaged: where `read_batch` would stop, the damaged members' pairs are left out.

A damaged label costs its own pair; a damaged image or mask costs the sample. `global_pairs` stays what the plan said,
so that the loss is still divided by the planned pairs of the global batch: no rank needs to know what another left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from numpy.typing import NDArray

from configs.tasks import TaskSpec
from data_pipeline.batch import Batch
from data_pipeline.draws import Augment
from data_pipeline.planning.plan import Slot
from data_pipeline.reading import read_batch
from data_pipeline.shards import ShardIndex
from data_pipeline.skips import MemberError, Skip
from data_pipeline.tarscan import IMAGE_FIELD, MASK_FIELD


def read_whole_members(
    index: ShardIndex,
    tasks: Sequence[TaskSpec],
    slots: Sequence[Slot],
    global_pairs: NDArray[Any],
    augment: Augment | None,
    *,
    shared: bool = False,
) -> Batch:
    """Read one micro-batch as `read_batch` does, of what is whole; `Batch.left_out` tells of the rest.

    Raises:
        UserError: a shard cannot be read or was replaced, which is no matter of one member.
    """
    try:
        return read_batch(index, tasks, slots, global_pairs, augment, shared=shared)
    except MemberError:  # Damage is rare; then this batch is read once more, member by member.
        whole, skips = _sift(index, tasks, slots)
        batch = read_batch(index, tasks, whole, global_pairs, augment, shared=shared)
        return replace(batch, left_out=tuple(skips))


def _sift(index: ShardIndex, tasks: Sequence[TaskSpec], slots: Sequence[Slot]) -> tuple[list[Slot], list[Skip]]:
    """Return the slots without damaged members, and what those are."""
    whole, skips = [], []
    for slot in slots:
        at = partial(_fault, index, slot.sample)
        if fault := at(IMAGE_FIELD, index.image) or at(MASK_FIELD, index.mask_valid):
            skips.append(fault)
            continue
        faults = [at(tasks[task].name, partial(index.label, spec=tasks[task])) for task in slot.tasks]
        skips += filter(None, faults)
        if kept := tuple(task for task, fault in zip(slot.tasks, faults, strict=True) if fault is None):
            whole.append(replace(slot, tasks=kept))
    return whole, skips


def _fault(index: ShardIndex, sample: int, member: str, read: Callable[[int], object]) -> Skip | None:
    try:
        read(sample)
    except MemberError as error:
        shard = index.shards[int(index.shard_of[sample])].name
        return Skip(index.keys[sample], shard, member, error.reason, str(error))
    return None
