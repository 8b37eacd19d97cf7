"""The constant predictor: for every metric, no other constant does better on the labels it was fitted on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.task_definitions import defined_in
from configs.tasks import HIGHER_IS_BETTER, TASKS, MetricKind, TaskSpec
from data_pipeline.index import ShardIndex
from data_pipeline.sample import Sample
from data_pipeline.shards import ShardWriter, write_index
from data_pipeline.targets import to_target
from trainer.evaluation.constant import constant_predictor
from trainer.evaluation.metrics import make_metric

SIDE = 8
KNOWN = defined_in({"define_tasks": {"far_depth": {"like": "depth_euclidean", "codes_per_metre": 64}}}, "own.yaml")
NAMES = ("depth_euclidean", "far_depth", "normal", "principal_curvature", "class_scene", "semseg", "saliency", "edges")
SPECS = tuple(KNOWN[name] for name in NAMES)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(5):
        labels = {
            "depth_euclidean": (rng.exponential(2000, (SIDE, SIDE)) + 100).astype(np.uint16),
            "normal": rng.integers(100, 256, (SIDE, SIDE, 3)).astype(np.uint8),
            "principal_curvature": rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8),
            "class_scene": rng.dirichlet(np.full(365, 0.05)).astype(np.float32),
            "semseg": rng.choice([0, 0, 0, 4, 15, 255], (SIDE, SIDE)).astype(np.uint8),
            "saliency": rng.choice([0, 255], (SIDE, SIDE)).astype(np.uint8),
            "edges": rng.choice([0, 0, 255], (SIDE, SIDE)).astype(np.uint8),
        }
        if number == 3:
            del labels["semseg"]
        rgb = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        mask = rng.choice([0, 255], (SIDE, SIDE)).astype(np.uint8)
        labels["depth_euclidean"][mask == 0] = 60000  # what nobody knows must not move the constant
        labels["far_depth"] = labels["depth_euclidean"]
        made.append(Sample(key=f"sample-{number}", rgb=rgb, labels=labels, mask_valid=mask))
    return made


@pytest.fixture(scope="module")
def index(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder / "000.tar", task_table=KNOWN) as writer:
        for sample in samples:
            writer.write(sample)
    write_index(folder, [writer.entry], KNOWN)
    return ShardIndex.load(folder)


def score(spec: TaskSpec, kind: MetricKind, constant: Tensor, samples: list[Sample]) -> float:
    metric = make_metric(kind, spec)
    for sample in samples:
        if spec.name in sample.labels:
            stored = torch.from_numpy(np.asarray(sample.labels[spec.name]))
            stored = stored.view(1, -1) if not spec.dense else stored.view(1, SIDE, SIDE, -1).permute(0, 3, 1, 2)
            target = to_target(spec, stored, torch.from_numpy(sample.mask_valid)[None] > 0)
            metric.update(constant.view(1, -1, *(1,) * (2 * spec.dense)).expand(_shape(spec)), target)
    value = metric.compute()
    assert value is not None
    return value


def _shape(spec: TaskSpec) -> tuple[int, ...]:
    return (1, spec.channels, SIDE, SIDE) if spec.dense else (1, spec.channels)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [(spec, kind) for spec in SPECS for kind in spec.metrics],
    ids=lambda value: getattr(value, "name", value),
)
def test_no_other_constant_does_better(
    spec: TaskSpec, kind: MetricKind, samples: list[Sample], index: ShardIndex
) -> None:
    constant = constant_predictor(index, SPECS, SIDE)[spec.name][kind]
    assert constant.shape == (spec.channels,)
    best = score(spec, kind, constant, samples)
    generator = torch.Generator().manual_seed(0)
    for size in (0.001, 0.01, 0.1, 1.0, 10.0):
        for _ in range(6):
            other = score(spec, kind, constant + size * torch.randn(spec.channels, generator=generator), samples)
            if kind == "mean_angle_deg":
                # The mean direction minimises 1 - cos, and the angle nearly so.
                assert other > best - 0.5
            elif kind in HIGHER_IS_BETTER:
                assert other <= best + 1e-6
            else:
                assert other >= best - 1e-6 * abs(best)


def test_missing_labels_and_limits(index: ShardIndex) -> None:
    assert "reshading" not in constant_predictor(index, (*SPECS, TASKS["reshading"]), SIDE)
    first = constant_predictor(index, SPECS[:1], SIDE, limit=1)
    assert not first["depth_euclidean"]["l1"].equal(constant_predictor(index, SPECS[:1], SIDE)["depth_euclidean"]["l1"])


def test_images_from_all_over_the_index_are_looked_at(tmp_path: Path) -> None:
    """The first shards hold one class, and more of the images that a look at the first ones would see."""
    spec = TASKS["class_scene"]
    rgb = np.zeros((1, 1, 3), np.uint8)
    entries = []
    for shard in range(40):
        first = shard < 20
        label = np.eye(spec.channels, dtype=np.float32)[3 if first else 7]
        with ShardWriter(tmp_path / f"{shard:03}.tar") as writer:
            for image in range(15 if first else 17):
                writer.write(Sample(key=f"{shard}-{image}", rgb=rgb, labels={spec.name: label}))
        entries.append(writer.entry)
    write_index(tmp_path, entries)
    constants = constant_predictor(ShardIndex.load(tmp_path), [spec], size=1)
    assert constants[spec.name]["accuracy"].argmax() == 7
