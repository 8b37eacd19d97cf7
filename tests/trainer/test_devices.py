"""What a GPU asks of a step, checked without one: tensors on the `meta` device have no values to wait for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.tasks import resolve_tasks
from data_pipeline.batch import Batch
from data_pipeline.targets import prepare_batch
from model import expert_runs
from model.matching import Matching
from model.mod_squad import ModSquad
from tests.trainer.loop_run import SIDE, loop_config
from trainer.objective import Objective

SPECS = resolve_tasks(["depth_euclidean", "normal", "edge_texture", "principal_curvature", "class_scene"])
PAIRS = (2, 1, 0, 1, 3)
CHANGES = ("brightness", "contrast", "saturation", "hue", "blur")


def batch_on(device: str) -> Batch:
    """Two images with every kind of label, turned, zoomed and changed in colour."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    labels = {}
    for spec, pairs in zip(SPECS, PAIRS, strict=True):
        shape = (spec.encoding.channels, SIDE, SIDE) if spec.dense else (spec.channels,)
        labels[spec.name] = zeros(pairs, *shape, dtype=getattr(torch, spec.encoding.dtype))
    return Batch(
        images=zeros(2, 3, SIDE, SIDE, dtype=torch.uint8),
        mask_valid=zeros(2, SIDE, SIDE, dtype=torch.bool),
        pair_image=zeros(sum(PAIRS), dtype=torch.int64),
        pair_task=zeros(sum(PAIRS), dtype=torch.int64),
        labels=labels,
        global_pairs=zeros(len(SPECS), dtype=torch.int64),
        flip=zeros(2, dtype=torch.bool),
        crop=zeros(2, 4),
        turns=zeros(2, 2, dtype=torch.int64),
        keys=("a", "b"),
        rotation=zeros(2),
        photometric={name: zeros(2) for name in CHANGES},
        inside=zeros(2, SIDE, SIDE, dtype=torch.bool),
    )


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_nothing_between_a_batch_and_its_gradients_waits_for_the_device(
    weighting: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ",".join(spec.name for spec in SPECS)
    config = loop_config(tmp_path, f"train.task_weighting={weighting}", f"tasks=[{names}]")
    model = ModSquad(config.model, SPECS, config.data.image_size)
    objective = Objective(model, Matching(config.matching, model.expert_layers, len(SPECS)), config, SPECS)
    objective.to("meta", torch.bfloat16)

    real, copied = torch.tensor, list[Any]()

    def tensor(data: Any, **options: Any) -> torch.Tensor:
        if torch.device(options.get("device") or "cpu").type != "cpu":
            copied.append(data)
        return real(data, **options)

    monkeypatch.setattr(expert_runs, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(torch, "tensor", tensor)
    loss, _ = objective(prepare_batch(batch_on("meta"), SPECS, SIDE), 1.0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert not copied, "each copy of a list would wait for all that the device was told before"
