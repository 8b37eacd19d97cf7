"""Evaluation metrics as accumulators whose state is one vector of sums.

A metric takes pairs batch by batch; the states of several ranks add up to the state of the whole dataset, so a result
does not depend on how the images were dealt. Pixels are pooled over the dataset: each valid pixel counts once. Masked
pixels are never counted. The boundary measure has its own file, `trainer.evaluation.edge_metric`.

Shapes: p pairs of one task, C channels, H and W in pixels.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from configs.tasks import MetricKind, TaskSpec
from data_pipeline.targets import Target, depth_metres
from trainer.evaluation.edge_metric import BoundaryF

# Squared weight of recall in the saliency measure, which favours precision (Achanta et al., CVPR 2009, equation 6).
SALIENCY_BETA2 = 0.3
SALIENCY_THRESHOLDS = torch.arange(1, 20) / 20


class Metric(Protocol):
    """One metric of one task."""

    state: Tensor
    """float64 sums on the CPU; states of disjoint sets of pairs add up."""

    def update(self, prediction: Tensor, target: Target) -> None:
        """Add pairs: raw head outputs (p, C, H, W) or (p, C) and their targets. p may be 0."""

    def compute(self) -> float | None:
        """Return the value over everything in `state`; None if no valid pixel or image was seen."""


def make_metric(kind: MetricKind, spec: TaskSpec) -> Metric:
    """Return a fresh accumulator of metric `kind` for task `spec`."""
    match kind:
        case "miou":
            return MeanIoU(spec.channels)
        case "max_f":
            return MaxF()
        case "ods_f":
            return BoundaryF()
        case _:
            return Mean(kind, spec)


class Mean:
    """Metrics that are a mean of a per-pixel or per-image error: everything but the counting ones below."""

    def __init__(self, kind: MetricKind, spec: TaskSpec) -> None:
        self._kind = kind
        self._spec = spec
        self.state = torch.zeros(2, dtype=torch.float64)

    def update(self, prediction: Tensor, target: Target) -> None:
        """Add the errors of p pairs."""
        errors = _ERRORS[self._kind](self._spec, prediction.float(), target.values)
        valid = target.mask.expand_as(errors)
        total = torch.where(valid, errors, 0.0).sum(dtype=torch.float64)
        self.state += torch.stack([total, valid.sum().double()]).cpu()

    def compute(self) -> float | None:
        """Return the mean; for `rmse_m` its square root."""
        total, count = self.state.tolist()
        if count == 0:
            return None
        mean = float(total / count)
        return mean**0.5 if self._kind == "rmse_m" else mean


def nearest_metres(spec: TaskSpec) -> float:
    """Return one stored unit of depth: nothing is nearer; keeps relative errors finite where a target says 0."""
    return 1 / spec.codes_per_metre


def _l1(spec: TaskSpec, prediction: Tensor, values: Tensor) -> Tensor:
    return (prediction - values).abs()


def _mse(spec: TaskSpec, prediction: Tensor, values: Tensor) -> Tensor:
    return (prediction - values).square()


def _abs_rel(spec: TaskSpec, prediction: Tensor, values: Tensor) -> Tensor:
    """Return |d - d*| / d* in metres."""
    metres = depth_metres(spec, values).clamp_min(nearest_metres(spec))
    return (_metres(spec, prediction) - metres).abs() / metres


def _squared_metres(spec: TaskSpec, prediction: Tensor, values: Tensor) -> Tensor:
    return (_metres(spec, prediction) - depth_metres(spec, values)).square()


def _metres(spec: TaskSpec, prediction: Tensor) -> Tensor:
    """Return metres, within the depths that the encoding can hold: an exponential of a wild guess may overflow."""
    return depth_metres(spec, prediction.clamp(0.0, 1.0))


def _angle_deg(spec: TaskSpec, prediction: Tensor, values: Tensor) -> Tensor:
    """Return the angle to the unit vectors `values` in degrees; 90 where the prediction has no direction.

    2 atan2(|u - v|, |u + v|) for unit u and v keeps small angles that arccos loses to rounding (Kahan).
    """
    unit = prediction / _length(prediction).clamp_min(1e-12)
    apart, along = (_length(unit + sign * values) for sign in (-1, 1))
    return torch.rad2deg(2 * torch.atan2(apart, along))


def _length(vectors: Tensor) -> Tensor:
    """Return the lengths (p, 1, H, W); on a CPU many times faster than `norm` over this dimension."""
    return vectors.square().sum(dim=1, keepdim=True).sqrt()


def _agreement(spec: TaskSpec, logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return 1 where the largest logit is the largest target probability."""
    return (logits.argmax(dim=1, keepdim=True) == probabilities.argmax(dim=1, keepdim=True)).float()


def _cross_entropy(spec: TaskSpec, logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return - sum_c p*_c log p_c in nats."""
    return -(probabilities * logits.log_softmax(dim=1)).sum(dim=1, keepdim=True)


# What each mean averages: dense (p, C or 1, H, W), vectors (p, 1).
_ERRORS: dict[MetricKind, Callable[[TaskSpec, Tensor, Tensor], Tensor]] = {
    "l1": _l1,
    "mse": _mse,
    "abs_rel": _abs_rel,
    "rmse_m": _squared_metres,
    "mean_angle_deg": _angle_deg,
    "accuracy": _agreement,
    "cross_entropy": _cross_entropy,
}


class MeanIoU:
    """Intersection over union from one confusion matrix of the dataset, averaged over classes.

    Classes that neither labels nor predictions contain have no IoU and are left out of the mean.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self.state = torch.zeros(classes * classes, dtype=torch.float64)

    def update(self, prediction: Tensor, target: Target) -> None:
        """Count the valid pixels of p pairs; prediction (p, C, H, W), target ids (p, H, W)."""
        valid = target.mask.squeeze(1)
        cell = target.values[valid] * self._classes + prediction.argmax(dim=1)[valid]
        self.state += torch.bincount(cell, minlength=self._classes**2).double().cpu()

    def compute(self) -> float | None:
        """Return the mean IoU, 0 to 1."""
        confusion = self.state.view(self._classes, self._classes)
        if confusion.sum() == 0:
            return None
        intersection = confusion.diagonal()
        union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
        return float((intersection[union > 0] / union[union > 0]).mean())


class MaxF:
    """Saliency: the best F over thresholds 0.05, 0.10, ..., 0.95 of the sigmoid, counts pooled over the dataset.

    F = (1 + b^2) P R / (b^2 P + R) with b^2 = 0.3 (Achanta et al., CVPR 2009).
    """

    def __init__(self) -> None:
        self.state = torch.zeros(2 * len(SALIENCY_THRESHOLDS) + 1, dtype=torch.float64)

    def update(self, prediction: Tensor, target: Target) -> None:
        """Count the valid pixels of p pairs; prediction (p, 1, H, W) logits."""
        score = prediction[target.mask].float().sigmoid()
        positive = target.values[target.mask] > 0.5
        # Position of each score among the thresholds; every threshold at or below it counts the pixel as predicted.
        thresholds = SALIENCY_THRESHOLDS.to(score)
        bins = torch.bucketize(score, thresholds, right=True)
        size = len(thresholds) + 1
        predicted = torch.bincount(bins, minlength=size).flip(0).cumsum(0).flip(0)[1:]
        hits = torch.bincount(bins[positive], minlength=size).flip(0).cumsum(0).flip(0)[1:]
        self.state += torch.cat([hits, predicted, positive.sum().view(1)]).double().cpu()

    def compute(self) -> float | None:
        """Return the best F, 0 to 1; None without any positive pixel."""
        hits, predicted = self.state[:-1].view(2, -1)
        positives = self.state[-1]
        if positives == 0:
            return None
        # F = (1 + b^2) hits / (b^2 positives + predicted), from the formula above.
        return float(((1 + SALIENCY_BETA2) * hits / (SALIENCY_BETA2 * positives + predicted)).max())
