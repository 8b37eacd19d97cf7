"""Evaluation: one result for any number of ranks, any forward function, honest comparison with the constant."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import RunConfig
from data_pipeline.index import ShardIndex
from data_pipeline.targets import Prepared
from tests.ranks import run_ranks
from tests.trainer.loop_run import SPECS, loop_config, make_shards
from trainer.evaluation.constant import constant_predictor
from trainer.evaluation.evaluate import Evaluation, Score, evaluate, squad_forward, write_evaluation
from trainer.run_files import read_latest_evaluation


def from_images(prepared: Prepared) -> Mapping[str, Tensor]:
    """Predictions that depend on each image alone."""
    predictions = {}
    for task, spec in enumerate(SPECS):
        images = prepared.images[prepared.pair_image[prepared.pair_task == task]]
        first = images[:, :1]
        predictions[spec.name] = first.expand(-1, spec.channels, -1, -1) + 0.1 if spec.dense else _logits(images)
    return predictions


def _logits(images: Tensor) -> Tensor:
    return torch.nn.functional.pad(images.flatten(1)[:, :100], (0, 265))


def measure(config: RunConfig, rank: int = 0, world: int = 1) -> Evaluation:
    train, val = ShardIndex.load(config.data.train), ShardIndex.load(config.data.val)
    constants = constant_predictor(train, SPECS, config.data.image_size)
    group = dist.group.WORLD if world > 1 else None
    return evaluate(from_images, val, config, SPECS, constants=constants, rank=rank, world=world, group=group, limit=5)


def _measure_rank(rank: int, world: int, config: RunConfig) -> Evaluation:
    return measure(config, rank, world)


def test_two_ranks_measure_what_one_process_does(tmp_path: Path) -> None:
    make_shards(tmp_path)
    config = loop_config(tmp_path, "evaluate.batch_size=2")  # 5 images: rank 1 runs out
    expected = measure(config)
    assert expected.images == 5
    for evaluation in run_ranks(_measure_rank, 2, config):
        assert evaluation.images == 5
        for name, scores in expected.scores.items():
            for kind, score in scores.items():
                assert evaluation.scores[name][kind].value == pytest.approx(score.value, rel=1e-6)
                assert evaluation.scores[name][kind].constant == pytest.approx(score.constant, rel=1e-6)


class DepthSquad(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {SPECS[0].name: images[:, :1] + 0.1}


def test_a_squad_is_measured_by_the_same_code(tmp_path: Path) -> None:
    make_shards(tmp_path)
    config = loop_config(tmp_path)
    val = ShardIndex.load(config.data.val)
    squad = evaluate(squad_forward(DepthSquad(), [SPECS[0].name]), val, config, SPECS[:1], constants={}, limit=5)
    whole = measure(config)
    for kind, score in squad.scores["depth_euclidean"].items():
        assert score.value == pytest.approx(whole.scores["depth_euclidean"][kind].value, rel=1e-6)
        assert score.constant is None


def test_the_file_says_what_readers_expect(tmp_path: Path) -> None:
    scores = {
        "normal": {"mean_angle_deg": Score(value=20.0, constant=30.0)},
        "class_scene": {"accuracy": Score(value=0.2, constant=0.3), "cross_entropy": Score(value=None, constant=1.0)},
        "semseg": {"miou": Score(value=None, constant=0.1)},
    }
    path = write_evaluation(tmp_path, Evaluation(images=9, scores=scores), step=12, split="val")  # type: ignore[arg-type]
    assert path == tmp_path / "evaluation" / "step_00000012_val.json"
    content = json.loads(path.read_text())
    assert (content["step"], content["split"], content["images"]) == (12, "val", 9)
    assert content["tasks"]["normal"]["beats_constant"] is True
    assert content["tasks"]["class_scene"]["beats_constant"] is False
    assert content["tasks"]["class_scene"]["higher_is_better"] is True
    assert content["tasks"]["class_scene"]["all"]["cross_entropy"] == {"value": None, "constant": 1.0}
    assert content["tasks"]["semseg"]["beats_constant"] is None
    record = read_latest_evaluation(tmp_path)
    assert record is not None
    assert record.tasks["normal"].value == 20.0


def test_a_diverged_model_gives_null_not_invalid_json(tmp_path: Path) -> None:
    make_shards(tmp_path)
    config = loop_config(tmp_path)

    def diverged(prepared: Prepared) -> Mapping[str, Tensor]:
        return {name: torch.full_like(value, torch.nan) for name, value in from_images(prepared).items()}

    evaluation = evaluate(diverged, ShardIndex.load(config.data.val), config, SPECS, constants={})
    write_evaluation(tmp_path, evaluation, step=1, split="val")
    assert evaluation.scores["depth_euclidean"]["abs_rel"].value is None
