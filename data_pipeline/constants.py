"""Constants that batches meet on their device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Return `values` as float32 (n,) on the device of `like`.

    Does not wait until the device has done what it was told before, as `torch.tensor(values, device=...)` does.
    """
    return torch.tensor(values, dtype=torch.float32).to(like.device, non_blocking=True)
