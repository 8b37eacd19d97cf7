import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from configs.errors import UserError
from configs.load import dump_config
from configs.schema import ModelConfig
from data_pipeline.index import ShardIndex
from data_pipeline.sample import Sample
from data_pipeline.shards import ShardWriter, write_index
from model.routing_stats import RoutingLedger
from tests.trainer.tiny_run import SIDE, TASKS, UNLABELLED, tiny_config, tiny_model
from trainer.cli.main import app
from trainer.evaluation.evaluate import evaluate, model_forward
from trainer.squads.curve import read_curve
from trainer.squads.export import load_squad
from trainer.squads.extraction import extract_tasks, read_summary

STEP = 7
PATCHES_MACS = 3 * SIDE**2 * 16  # every pixel's three values times the width, once per image


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """The tiny run with the ledger of an evaluation of its checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    config = tiny_config(tiny_run)
    model = tiny_model(config)
    ledger = RoutingLedger(model.expert_layers, TASKS)
    index = ShardIndex.load(config.data.val)
    evaluate(model_forward(model, ledger), index, config, config.task_specs, constants={})
    write_ledger(folder, ledger, STEP)
    return folder


def write_ledger(run: Path, ledger: RoutingLedger, step: int) -> None:
    (run / "routing").mkdir(exist_ok=True)
    (run / "routing" / f"step_{step:08d}.json").write_text(json.dumps(ledger.to_json()))


def test_threshold_0_keeps_everything_and_changes_nothing(run: Path) -> None:
    summary = extract_tasks(run, ["normal"], run / "squads" / "normal", threshold=0.0)
    assert summary.experts == (8, 8)
    (score,) = summary.scores
    assert score.after == pytest.approx(score.before, rel=1e-6)
    assert score.unaffected_tokens == score.unaffected_images == 1.0
    assert summary.parameters_after < summary.parameters_before  # the other tasks' heads, routers and embeddings
    assert summary.macs_after == summary.macs_before
    assert (summary.step, summary.images, summary.image_size) == (STEP, 5, SIDE)
    assert (score.task, score.metric) == ("normal", "mean_angle_deg")


def test_threshold_1_keeps_the_k_most_used_experts_of_each_layer(run: Path) -> None:
    out = run / "squads" / "depth_zbuffer"
    summary = extract_tasks(run, ["depth_zbuffer"], out, threshold=1.0)
    ledger = RoutingLedger.from_json(json.loads((run / "routing" / f"step_{STEP:08d}.json").read_text()))
    for layer in summary.layers:
        used = ledger.share(layer.name, "depth_zbuffer")
        assert len(layer.kept) == 2
        left_out = [expert for expert in range(4) if expert not in layer.kept]
        assert used[list(layer.kept)].min() >= used[left_out].max()
    tokens = summary.scores[0].unaffected_tokens
    assert 0.0 <= tokens <= min(layer.unaffected_share for layer in summary.layers) < 1.0
    squad = load_squad(out)
    assert squad.kept == {layer.name: list(layer.kept) for layer in summary.layers}
    assert sum(value.numel() for value in squad.parameters()) == summary.parameters_after
    assert squad(torch.zeros(1, 3, SIDE, SIDE))["depth_zbuffer"].shape == (1, 1, SIDE, SIDE)


def test_tasks_that_leave_together_are_each_measured(run: Path) -> None:
    """The whole squad against the two of one task: the union of experts, and every task's own metric before."""
    alone = {task: extract_tasks(run, [task], run / task, threshold=1.0) for task in ("normal", "class_scene")}
    both = extract_tasks(run, ["normal", "class_scene"], run / "both", threshold=1.0)
    assert both.tasks == ("class_scene", "normal")  # the run's order
    for number, layer in enumerate(both.layers):
        assert layer.kept == tuple(sorted({expert for one in alone.values() for expert in one.layers[number].kept}))
    assert both.experts[0] > 4
    for score in both.scores:
        own = alone[score.task].scores[0]
        assert score.before == pytest.approx(own.before, rel=1e-6)
        assert score.unaffected_tokens >= own.unaffected_tokens
    assert both.macs_after == both.macs_before == sum(one.macs_before for one in alone.values()) - PATCHES_MACS
    squad = load_squad(run / "both")
    assert {task: tuple(x.shape) for task, x in squad(torch.zeros(2, 3, SIDE, SIDE)).items()} == {
        "class_scene": (2, 365),
        "normal": (2, 3, SIDE, SIDE),
    }


def test_what_was_measured_lies_beside_the_squad(run: Path) -> None:
    out = run / "squads" / "class_scene"
    summary = extract_tasks(run, ["class_scene"], out)
    assert read_summary(out) == summary
    assert read_summary(out, step=STEP) == summary
    assert read_summary(out, step=STEP + 1) is None
    assert read_summary(run / "squads" / "normal") is None


def test_images_limit_what_is_measured(run: Path) -> None:
    few = extract_tasks(run, ["class_scene"], run / "few", images=UNLABELLED + 1)
    assert few.images == UNLABELLED + 1
    assert few.scores[0].before in (0.0, 1.0)  # accuracy on the only labelled image of the two


def test_counting_on_the_validation_shards_needs_no_evaluation(run: Path) -> None:
    tasks = ["class_scene", "depth_zbuffer"]
    by_ledger = extract_tasks(run, tasks, run / "one", threshold=0.4)
    shutil.rmtree(run / "routing")
    anew = extract_tasks(run, tasks, run / "two", threshold=0.4, routing="validation")
    assert anew == by_ledger.model_copy(update={"routing": "validation"})
    assert 4 < anew.experts[0] < 8


def test_counting_anew_is_on_the_measured_images(run: Path) -> None:
    """An image has four tokens: an expert that any of them chose has a share of at least a quarter."""
    summary = extract_tasks(run, ["normal"], run / "one", threshold=0.25, routing="validation", images=1)
    assert summary.scores[0].unaffected_tokens == summary.scores[0].unaffected_images == 1.0
    assert summary.experts[0] < 8


@pytest.mark.parametrize(
    "changes",
    [
        {"placement": "dense"},
        {"routers": "shared"},
        {"placement": "every", "shared_blocks": 2, "task_embedding": "none"},
    ],
    ids=["dense", "one router", "trunk"],
)
def test_models_that_are_not_the_published_one_leave_too(
    changes: dict[str, Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(run)
    sizes = ModelConfig.model_validate({**config.model.model_dump(), **changes})
    config = config.model_copy(update={"model": sizes})
    monkeypatch.setattr("trainer.squads.extraction.load_run_model", lambda *_: (tiny_model(config), config, STEP))
    summary = extract_tasks(run, TASKS, run / "out", threshold=0.0, routing="validation", curve=True)
    for score in summary.scores:
        assert score.after == pytest.approx(score.before, rel=1e-6)
        assert score.unaffected_images == 1.0
    curve = read_curve(run / "out")
    assert curve is not None
    assert curve.points[0] == summary
    assert (len(curve.points) > 1) == bool(summary.layers)
    assert len(load_squad(run / "out")(torch.zeros(1, 3, SIDE, SIDE))) == len(TASKS)


def test_the_command_names_the_folder_by_the_tasks(run: Path) -> None:
    command = ["extract", str(run), "--task", "normal,class_scene", "--routing", "validation", "--curve"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "squads by threshold" in done.output
    found = read_summary(run / "squads" / "class_scene+normal")
    assert found is not None
    assert found.tasks == ("class_scene", "normal")


def test_images_without_the_task_s_label_are_refused(run: Path) -> None:
    (run / "bare").mkdir()
    with ShardWriter(run / "bare" / "shard_000000.tar") as writer:
        pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        writer.write(Sample(key="sample", rgb=pixels, labels={"normal": pixels}))
    write_index(run / "bare", [writer.entry])
    config = tiny_config(run, ep_size=2)
    data = config.data.model_copy(update={"val": str(run / "bare")})
    (run / "config.yaml").write_text(dump_config(config.model_copy(update={"data": data})))
    with pytest.raises(UserError, match="no validation image to measure on has a label of 'class_scene'"):
        extract_tasks(run, ["normal", "class_scene"], run / "few")
    assert not (run / "few").exists()


def test_an_unknown_task_is_named(run: Path) -> None:
    with pytest.raises(UserError, match=r"not trained on task 'edges'; its tasks: class_scene, depth_zbuffer, normal"):
        extract_tasks(run, ["normal", "edges"], run / "out")


def test_the_ledger_is_that_of_the_weights_that_leave(run: Path) -> None:
    own = run / "routing" / f"step_{STEP:08d}.json"
    ledger = RoutingLedger.from_json(json.loads(own.read_text()))
    expected = extract_tasks(run, ["normal"], run / "one", threshold=1.0)
    write_ledger(run, RoutingLedger(ledger.layers, ledger.tasks), STEP + 1)
    assert extract_tasks(run, ["normal"], run / "two", threshold=1.0) == expected
    own.unlink()
    with pytest.raises(UserError, match=r"step 7, and there is none: run `modsquad evaluate"):
        extract_tasks(run, ["normal"], run / "out")
    assert not (run / "out").exists()


def test_a_damaged_summary_is_named(run: Path) -> None:
    out = run / "squads" / "normal"
    extract_tasks(run, ["normal"], out, images=1)
    values = json.loads((out / "squad.json").read_text())
    del values["scores"][0]["metric"]
    (out / "squad.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"squad\.json: scores\.0\.metric"):
        read_summary(out)
    (out / "squad.json").write_text(json.dumps({**values, "scores": []}))
    with pytest.raises(UserError, match=r"squad\.json: scores"):
        read_summary(out)
