"""Evaluation: every image of an index once, over all ranks, against the best constant prediction.

`evaluate` takes any function from a prepared batch to predictions, so the model in training, an exported model and an
extracted squad are measured by the same code. Metric states are sums, added over ranks in one collective.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.atomic import write_text_atomically
from configs.errors import UserError
from configs.schema import RunConfig
from configs.tasks import HIGHER_IS_BETTER, MetricKind, TaskSpec
from data_pipeline.batch import Batch
from data_pipeline.index import ShardIndex
from data_pipeline.loader import EvaluationLoader
from data_pipeline.run_shards import open_shards
from data_pipeline.targets import Prepared, prepare_batch
from model.mod_squad import ModelOutput, ModSquad
from model.routing_stats import RoutingLedger
from trainer.distributed.agreement import on_each
from trainer.evaluation.constant import Constants, constant_predictor
from trainer.evaluation.metrics import Metric, make_metric
from trainer.run_files import EvaluationRecord, evaluation_path, ledger_path, parse, read_latest_evaluation, read_text
from trainer.squads.export import available_device, load_run_model

Forward = Callable[[Prepared], Mapping[str, Tensor]]
"""Prepared batch -> raw head outputs per task, in pair order, for at least the evaluated tasks."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric of the model and of the best constant; None where no pixel or image could be judged."""

    value: float | None
    constant: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of some images; the same on every rank.

    Attributes:
        images: images evaluated.
        scores: task name -> metric -> score.
    """

    images: int
    scores: dict[str, dict[MetricKind, Score]]

    def to_json(self, step: int, split: str) -> dict[str, Any]:
        """Return the content of an evaluation file (DESIGN 5)."""
        tasks = {}
        for name, scores in self.scores.items():
            metric, first = next(iter(scores.items()))
            tasks[name] = {
                "metric": metric,
                "higher_is_better": metric in HIGHER_IS_BETTER,
                "value": first.value,
                "constant": first.constant,
                "beats_constant": _beats(metric, first),
                "all": {kind: {"value": score.value, "constant": score.constant} for kind, score in scores.items()},
            }
        return {"step": step, "split": split, "images": self.images, "tasks": tasks}


def _beats(metric: MetricKind, score: Score) -> bool | None:
    if score.value is None or score.constant is None:
        return None
    return score.value > score.constant if metric in HIGHER_IS_BETTER else score.value < score.constant


def evaluate(
    forward: Forward,
    index: ShardIndex,
    config: RunConfig,
    tasks: Sequence[TaskSpec],
    *,
    constants: Constants,
    rank: int = 0,
    world: int = 1,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Measure `forward` on the first `limit` images of `index` (None: all). Every rank must call it.

    Args:
        forward: called equally often on every rank, with empty batches where a rank has run out of images.
        index: the shards to evaluate on.
        config: gives image size, batch size and loader processes.
        tasks: tasks to evaluate, in the order of the pairs' task numbers.
        constants: what `constant_predictor` returns.
        rank, world, group: this rank among those that share the work; `group` None for one process.
        device: where images and targets go; None: the CPU.
        limit: images from the start of the index.
    """
    metrics = {(spec.name, kind): make_metric(kind, spec) for spec in tasks for kind in spec.metrics}
    baseline = {(spec.name, kind): make_metric(kind, spec) for spec in tasks for kind in constants.get(spec.name, {})}
    loader = EvaluationLoader(
        index,
        tasks,
        batch_size=config.evaluate.batch_size,
        rank=rank,
        world=world,
        limit=limit,
        workers=config.data.workers,
    )
    try:
        with torch.no_grad():
            for batch in _agreed(iter(loader), group):
                prepared = prepare_batch(batch.to(device or torch.device("cpu")), tasks, config.data.image_size)
                predictions = forward(prepared)
                for (name, _), metric in metrics.items():
                    metric.update(predictions[name], prepared.targets[name])
                for (name, kind), metric in baseline.items():
                    prediction = _expand(constants[name][kind], predictions[name])
                    metric.update(prediction, prepared.targets[name])
    finally:
        loader.close()
    _sum_states([*metrics.values(), *baseline.values()], group, device)
    scores: dict[str, dict[MetricKind, Score]] = {spec.name: {} for spec in tasks}
    for (name, kind), metric in metrics.items():
        constant = baseline[name, kind].compute() if (name, kind) in baseline else None
        scores[name][kind] = Score(value=_finite(metric.compute()), constant=_finite(constant))
    images = len(index.keys) if limit is None else min(limit, len(index.keys))
    return Evaluation(images=images, scores=scores)


def _agreed(batches: Iterator[Batch], group: dist.ProcessGroup | None) -> Iterator[Batch]:
    """Yield the batches; an error in those of one rank is raised on all."""
    while True:
        batch = next(batches, None) if group is None else on_each(group, lambda: next(batches, None))
        if batch is None:
            return
        yield batch


def _finite(value: float | None) -> float | None:
    """Return None for what JSON cannot hold: the value of a model that has diverged."""
    return value if value is not None and math.isfinite(value) else None


def _expand(constant: Tensor, like: Tensor) -> Tensor:
    """Return `constant` (C,) at every pair and pixel of `like` (p, C) or (p, C, H, W)."""
    return constant.to(like.device).view(1, -1, *(1,) * (like.dim() - 2)).expand_as(like)


def _sum_states(metrics: Sequence[Metric], group: dist.ProcessGroup | None, device: torch.device | None) -> None:
    """Add the states of all ranks, in one collective."""
    if group is None:
        return
    packed = torch.cat([metric.state for metric in metrics]).to(device)
    dist.all_reduce(packed, group=group)
    parts = torch.split(packed.cpu(), [len(metric.state) for metric in metrics])
    for metric, part in zip(metrics, parts, strict=True):
        metric.state = part


def model_forward(model: ModSquad, ledger: RoutingLedger | None = None) -> Forward:
    """Return the `Forward` of a whole model, which also counts routing in `ledger`."""

    def forward(prepared: Prepared) -> Mapping[str, Tensor]:
        output: ModelOutput = model(prepared.images, prepared.pair_image, prepared.pair_task)
        if ledger is not None:
            ledger.update(output.routing)
        return output.predictions

    return forward


def squad_forward(squad: nn.Module, tasks: Sequence[str]) -> Forward:
    """Return the `Forward` of an extracted squad, to be evaluated on just these tasks, in this order."""

    def forward(prepared: Prepared) -> Mapping[str, Tensor]:
        predictions = squad(prepared.images)
        images = {name: prepared.pair_image[prepared.pair_task == task] for task, name in enumerate(tasks)}
        return {name: predictions[name][image] for name, image in images.items()}

    return forward


def write_evaluation(run_dir: Path, evaluation: Evaluation, *, step: int, split: str) -> Path:
    """Write the evaluation's file atomically and return its path; one rank calls it."""
    path = evaluation_path(run_dir, step, split)
    write_text_atomically(path, json.dumps(evaluation.to_json(step, split), indent=2, allow_nan=False) + "\n")
    return path


def write_ledger(run_dir: Path, ledger: RoutingLedger, *, step: int) -> Path:
    """Write `RUN/routing/step_XXXXXXXX.json` atomically and return its path; one rank calls it."""
    path = ledger_path(run_dir, step)
    write_text_atomically(path, json.dumps(ledger.to_json(), allow_nan=False) + "\n")
    return path


def latest_evaluation(run_dir: Path, *, step: int, split: str = "val") -> EvaluationRecord | None:
    """Return the evaluation of `step` on `split` if it is the latest one, else None."""
    record = read_latest_evaluation(run_dir, split)
    return record if record is not None and record.step == step else None


def evaluate_run(run_dir: Path, split: Literal["train", "val"] = "val") -> EvaluationRecord:
    """Evaluate the latest checkpoint of a run in this process, write its files and return what was measured.

    The routing ledger belongs to the validation shards, so `split` "train" leaves it alone.

    Raises:
        UserError: no such split, no run, no checkpoint, or no shards.
    """
    if split not in ("train", "val"):
        raise UserError(f"there is no split '{split}': use train or val")
    device = available_device()
    model, config, step = load_run_model(run_dir, device)
    train_index = open_shards(config, "train")
    index = train_index if split == "train" else open_shards(config, "val")
    tolerant = config.data.max_bad_samples > 0
    constants = constant_predictor(train_index, config.task_specs, config.data.image_size, tolerant=tolerant)
    ledger = RoutingLedger(model.expert_layers, [spec.name for spec in config.task_specs])
    evaluation = evaluate(
        model_forward(model, ledger),
        index,
        config,
        config.task_specs,
        constants=constants,
        device=device,
        limit=config.evaluate.images,
    )
    if split == "val":
        write_ledger(run_dir, ledger, step=step)
    path = write_evaluation(run_dir, evaluation, step=step, split=split)
    return parse(EvaluationRecord, read_text(path), str(path))
