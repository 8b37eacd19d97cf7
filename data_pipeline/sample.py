"""One image with its labels, as every source yields it and the packer writes it.

Labels are arrays in the *stored* encoding of their task (`configs.tasks.TaskSpec.encoding`): the official one, with
nothing normalised. A task whose label does not exist for this image has no entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
