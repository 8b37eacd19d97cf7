"""One image with its labels, as every source yields it and the packer writes it.

Labels are arrays in the *stored* encoding of their task (`configs.tasks.TaskSpec.encoding`): the official one, with
nothing normalised. A task whose label does not exist for this image has no entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.tasks import TaskSpec, TaskTable

AnyArray = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with the labels that exist for it.

    Attributes:
        key: unique name inside its dataset; letters, digits, `_`, `-` and `/` only (it becomes a tar member name).
        rgb: (H, W, 3) uint8.
        labels: task name -> array in the task's stored encoding; dense labels are (H, W) or (H, W, C), vectors (C,).
        mask_valid: (H, W) uint8, 0 where nothing is known about the scene (no geometry), 255 elsewhere; None where the
            dataset has no such mask.
        meta: JSON-serialisable facts about the sample (camera, building, scene type).
    """

    key: str
    rgb: NDArray[np.uint8]
    labels: Mapping[str, AnyArray]
    mask_valid: NDArray[np.uint8] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def known_labels(
    labels: Mapping[str, AnyArray], task_table: TaskTable, mask_valid: NDArray[np.uint8] | None
) -> dict[str, AnyArray]:
    """Return the labels without those that are unknown in every pixel: void, or excluded by `mask_valid`.

    Such a label is none: it would take a training pair without adding to the loss.

    Args:
        labels: as a sample has them, of the mask's size.
        task_table: the rows of their tasks.
        mask_valid: as the sample has it.
    """
    return {name: label for name, label in labels.items() if _is_known(task_table[name], label, mask_valid)}


def _is_known(spec: TaskSpec, label: AnyArray, mask_valid: NDArray[np.uint8] | None) -> bool:
    counted = label[mask_valid > 0] if spec.uses_mask_valid and mask_valid is not None else label
    void = spec.encoding.invalid
    return counted.size > 0 and (void is None or bool((counted != void).any()))
