"""Training losses: one number per (image, task) pair.

The loss of a pair is the mean over its valid pixels, so a pair counts the same however much of its image is masked.
Every function computes in fp32 whatever the model's precision, and gives exactly 0 with a zero gradient for a pair
without any valid pixel.

Shapes: p pairs of one task, C channels, H and W in pixels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.tasks import LossKind, TaskSpec
from data_pipeline.targets import Target

# A predicted direction shorter than this is scaled as if it had this length, which bounds the gradient of its cosine.
SHORTEST_DIRECTION = 1e-3


def pair_losses(spec: TaskSpec, prediction: Tensor, target: Target) -> Tensor:
    """Return the loss of every pair of one task.

    Args:
        spec: the task.
        prediction: raw output of the task's head, (p, C, H, W) for dense tasks or (p, C) for vectors, any float dtype.
        target: what `data_pipeline.targets.to_target` gives for the same pairs. p may be 0.

    Returns:
        (p,) fp32, with a gradient to `prediction`.
    """
    prediction = prediction.float()
    if spec.loss == "soft_cross_entropy":
        return masked_mean(_soft_cross_entropy(prediction, target.values), target.mask)
    if spec.loss == "cross_entropy":
        # Pixels of an unknown class (255 in labels) are masked, and their id is a valid one.
        errors = F.cross_entropy(prediction, target.values, reduction="none")
        return masked_mean(errors.unsqueeze(1), target.mask)
    # Masked pixels may hold anything, even NaN; zeros there keep 0 * NaN out of the gradient.
    values = torch.where(target.mask, target.values.float(), 0.0)
    if spec.loss == "balanced_bce":
        return masked_mean(_balanced_bce(prediction, values, target.mask), target.mask)
    return masked_mean(_PIXEL_LOSSES[spec.loss](prediction, values), target.mask)


def masked_mean(errors: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each pair's valid errors, 0 without any: (p, 1, ...) and bool of the same shape -> (p,)."""
    count = mask.flatten(1).sum(dim=1).clamp_min(1)
    return torch.where(mask, errors, 0.0).flatten(1).sum(dim=1) / count


def _l1(prediction: Tensor, values: Tensor) -> Tensor:
    return (prediction - values).abs().mean(dim=1, keepdim=True)


def _l2(prediction: Tensor, values: Tensor) -> Tensor:
    return (prediction - values).square().mean(dim=1, keepdim=True)


def _cosine(prediction: Tensor, values: Tensor) -> Tensor:
    """Return 1 - cos of the angle between the two vectors; `values` has unit length."""
    # As functional.normalize, which takes forty times as long over this dimension on a CPU.
    length = prediction.square().sum(dim=1, keepdim=True).clamp_min(SHORTEST_DIRECTION**2).sqrt()
    return 1.0 - (prediction * values).sum(dim=1, keepdim=True) / length


_PIXEL_LOSSES: dict[LossKind, Callable[[Tensor, Tensor], Tensor]] = {"l1": _l1, "l2": _l2, "cosine": _cosine}


def _soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return - sum_c p*_c log p_c: (p, C) and (p, C) -> (p, 1)."""
    return -(probabilities.float() * F.log_softmax(logits, dim=1)).sum(dim=1, keepdim=True)


def _balanced_bce(logits: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return class-balanced binary cross-entropy per pixel (HED, arXiv 1504.06375, equation 2).

    Positives weigh 1 - s and negatives s, with s the share of positives among the pair's own valid pixels, so that both
    classes weigh the same in total. A pair of one class only has no such balance and loss 0, as in the paper.
    """
    count = mask.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1)
    share = values.sum(dim=(1, 2, 3), keepdim=True) / count
    weight = torch.where(values > 0.5, 1.0 - share, share)
    return weight * F.binary_cross_entropy_with_logits(logits, values, reduction="none")
