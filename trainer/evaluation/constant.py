"""The best constant prediction per task and metric, from training labels: what a model has to beat.

A constant is one raw head output, the same for every image and pixel. Which one is best depends on the metric: the
median for l1, the mean for squares, the mean direction for angles, the most frequent class for counts. It is fitted on
images from all over the training index, on at most `VALUES_PER_PAIR` pixels of each label, spread evenly.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from configs.tasks import MetricKind, TaskSpec
from data_pipeline.index import ShardIndex
from data_pipeline.loader import EvaluationLoader
from data_pipeline.targets import DEPTH_CODES, Target, depth_metres, prepare_batch
from trainer.evaluation.metrics import nearest_metres

# Enough for constants that no longer move in the digits that are reported.
IMAGES = 512
VALUES_PER_PAIR = 1024
# A logit that is certainly positive or negative for any threshold.
CERTAIN_LOGIT = 10.0

Constants = Mapping[str, Mapping[MetricKind, Tensor]]
"""Task name -> metric -> (C,) fp32 raw head output."""


def constant_predictor(
    index: ShardIndex, tasks: Sequence[TaskSpec], size: int, limit: int | None = IMAGES, *, tolerant: bool = False
) -> Constants:
    """Return the best constants on `limit` images of `index` (None: all), at `size` x `size` pixels.

    They lie evenly in shards from all over the index, since neighbours are alike: one building, one scene. A task
    without a label among them has no entry, and is evaluated without a constant. No communication: every rank computes
    the same values. A tolerant one goes by what is whole, where a run may leave out damaged samples.

    Raises:
        UserError: a damaged shard.
    """
    samples: dict[str, list[Tensor]] = defaultdict(list)
    loader = EvaluationLoader(
        index, tasks, batch_size=8, rank=0, world=1, limit=limit, workers=0, spread=True, tolerant=tolerant
    )
    try:
        for batch in loader:
            for name, target in prepare_batch(batch, tasks, size).targets.items():
                samples[name].extend(_valid_values(target))
    finally:
        loader.close()
    return {
        spec.name: {kind: _BEST[kind](spec, torch.cat(samples[spec.name])) for kind in spec.metrics}
        for spec in tasks
        if any(len(values) for values in samples[spec.name])
    }


def _valid_values(target: Target) -> list[Tensor]:
    """Return, per pair, the target at evenly spread valid pixels: (n, C) values or (n,) class ids; vectors (1, C)."""
    if target.values.dim() == 2:
        return list(torch.split(target.values, 1))
    rows = []
    for values, mask in zip(target.values, target.mask.squeeze(1), strict=True):
        valid = values[mask] if values.dim() == 2 else values[:, mask].T
        rows.append(valid[:: -(-len(valid) // VALUES_PER_PAIR) or 1])
    return rows


def _median(spec: TaskSpec, values: Tensor) -> Tensor:
    return values.median(dim=0).values


def _mean(spec: TaskSpec, values: Tensor) -> Tensor:
    return values.mean(dim=0)


def _mean_depth(spec: TaskSpec, values: Tensor) -> Tensor:
    """Return the log depth of the mean in metres: the inverse of `depth_metres`."""
    return torch.log1p(depth_metres(spec, values).mean(dim=0) * spec.codes_per_metre) / math.log(DEPTH_CODES)


def _relative_median(spec: TaskSpec, values: Tensor) -> Tensor:
    """Return the d that minimises sum |d - d*| / d*: the median with weights 1 / d*."""
    values = values[:, 0].sort().values
    cumulative = (1 / depth_metres(spec, values).clamp_min(nearest_metres(spec))).double().cumsum(dim=0)
    return values[torch.searchsorted(cumulative, cumulative[-1] / 2)].view(1)


def _most_frequent_class(spec: TaskSpec, values: Tensor) -> Tensor:
    ids = values.argmax(dim=1) if values.dim() == 2 else values
    return CERTAIN_LOGIT * one_hot(torch.bincount(ids, minlength=spec.channels).argmax(), spec.channels).float()


def _log_mean(spec: TaskSpec, values: Tensor) -> Tensor:
    return values.mean(dim=0).clamp_min(torch.finfo(torch.float32).tiny).log()


def _all_positive(spec: TaskSpec, values: Tensor) -> Tensor:
    return torch.tensor([CERTAIN_LOGIT])


def _all_negative(spec: TaskSpec, values: Tensor) -> Tensor:
    return torch.tensor([-CERTAIN_LOGIT])


# Metric -> the raw head output (C,) that does best on target values (n, C), or class ids (n,).
_BEST: dict[MetricKind, Callable[[TaskSpec, Tensor], Tensor]] = {
    "l1": _median,
    "mse": _mean,
    "mean_angle_deg": _mean,  # a direction: its length does not matter
    "rmse_m": _mean_depth,
    "abs_rel": _relative_median,
    "accuracy": _most_frequent_class,
    "cross_entropy": _log_mean,
    "miou": _most_frequent_class,
    "max_f": _all_positive,
    "ods_f": _all_negative,  # nothing constant has an edge
}
