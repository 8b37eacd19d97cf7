import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from PIL import Image

from configs.errors import UserError
from model.layer_routing import ExpertLayerInfo
from model.routing_stats import RoutingLedger
from tests.trainer.run_folder import (
    LAYERS,
    TASKS,
    conflict_record,
    squad_summary,
    step_line,
    write_lines_of_grown_batch,
    write_run_folder,
)
from trainer.charts.training import progress_chart
from trainer.report.build import write_report
from trainer.squads.export import SQUAD_FILE, SQUAD_FORMAT


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run_folder(tmp_path / "my-run")


def text_of(page: Path) -> str:
    without_pictures = re.sub(r'src="[^"]*"', "", page.read_text(encoding="utf-8"))
    return re.sub(r"<[^>]*>", " ", without_pictures)


def test_the_report_shows_what_the_run_holds(run: Path) -> None:
    page = write_report(run)
    assert page == run / "report" / "index.html"
    text = text_of(page)
    assert "my-run" in text
    assert "40 of 40" in text
    assert "1 of 2 tasks" in text
    assert "+60.00 %" in text  # depth: 0.2 against a constant's 0.5
    assert "-10.00 %" in text  # normals: 33 degrees against 30
    assert "not better" in text
    assert {path.name for path in page.parent.iterdir()} == {
        "index.html",
        "progress.png",
        "task_losses.png",
        "experts.png",
        "experts_blocks.0.attention.png",
        "experts_blocks.1.mlp.png",
        "affinity.png",
    }
    assert page.read_text(encoding="utf-8").count("data:image/png;base64,") == 6
    for path in page.parent.glob("*.png"):
        Image.open(path).verify()


def test_images_are_counted_as_logged_where_the_batch_has_changed(run: Path) -> None:
    write_lines_of_grown_batch(run)
    with mock.patch("trainer.report.training.progress_chart", wraps=progress_chart) as drawn:
        words = " ".join(text_of(write_report(run)).split())
    assert "images seen 800 " in words
    assert list(drawn.call_args.args[1].images_per_second) == [32.0] * 20 + [128.0] * 20


def test_missing_parts_are_named_with_their_remedy(run: Path) -> None:
    for path in [run / "metrics.jsonl", *run.glob("evaluation/*"), *run.glob("routing/*")]:
        path.unlink()
    text = text_of(write_report(run))
    for part in ("no predictions", "no evaluation", "no logged steps", "no routing ledger", "no squad"):
        assert f"Missing: {part}" in text
    assert f"modsquad evaluate {run}" in text
    assert f"modsquad extract {run}" in text
    assert f"Not measured; `modsquad conflict {run}`" in text


def test_squads_are_tabulated(run: Path) -> None:
    folder = run / "squads" / "normal"
    folder.mkdir(parents=True)
    (folder / SQUAD_FILE).write_text(json.dumps({"format": SQUAD_FORMAT, **squad_summary().model_dump(mode="json")}))
    text = text_of(write_report(run))
    assert "4 of 8" in text
    assert "2 M → 900 k" in text
    assert "+0.50 %" in text
    assert "98.00 %" in text


def test_a_squad_that_cannot_be_read_is_named_beside_the_others(run: Path) -> None:
    for name, content in (
        ("normal", {"format": SQUAD_FORMAT, **squad_summary().model_dump(mode="json")}),
        ("older", {"format": "modsquad.squad.0"}),
    ):
        (run / "squads" / name).mkdir(parents=True)
        (run / "squads" / name / SQUAD_FILE).write_text(json.dumps(content))
    text = write_report(run).read_text()
    assert "the squad in older" in text
    assert "modsquad.squad.0" in text
    assert "unaffected tokens" in text


def test_held_out_images_are_shown_beside_the_truth(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    page = write_report(run, rooms=2)
    text = text_of(page)
    assert "checkpoint of step 7" in text
    assert "no predictions" not in text
    assert "2 (latest checkpoint)" in text  # ranks
    assert {path.name for path in page.parent.glob("*.png")} == {"predictions_0.png", "predictions_1.png"}


def test_a_new_report_replaces_the_old_one(run: Path) -> None:
    page = write_report(run)
    (page.parent / "predictions_9.png").write_bytes(b"from an older report")
    for path in run.glob("routing/*"):
        path.unlink()
    (run / "metrics.jsonl").write_text(json.dumps(step_line(20)) + "\n")
    write_report(run)
    assert "20 of 40" in text_of(page)
    assert not (page.parent / "predictions_9.png").exists()
    assert not (page.parent / "experts.png").exists()


def test_the_most_used_experts_of_every_task_are_tabulated(run: Path) -> None:
    words = " ".join(text_of(write_report(run)).split())
    assert "depth_zbuffer 0 100 % 1 100 % 0 100 % 1 100 % normal 2 100 % 3 100 % 2 100 % 3 100 %" in words


def test_gradient_conflict_is_shown_for_experts_and_shared_weights(run: Path) -> None:
    (run / "conflict").mkdir()
    (run / "conflict" / "step_00000040.json").write_text(conflict_record().model_dump_json())
    page = write_report(run)
    words = " ".join(text_of(page).split())
    assert "experts 2 k 0 0.00 % 0 shared weights 2 k -0.25 100.00 % 0.25" in words
    assert {path.name for path in page.parent.glob("conflict_*.png")} == {"conflict_layers.png", "conflict_maps.png"}


NO_EXPERTS: dict[str, tuple[tuple[ExpertLayerInfo, ...], str]] = {
    "dense": ((), "This model has no experts."),
    "all shared": (
        tuple(replace(layer, sees_task=False) for layer in LAYERS),
        "All expert layers of this model lie in the shared",
    ),
}


@pytest.mark.parametrize(("layers", "reason"), NO_EXPERTS.values(), ids=NO_EXPERTS)
def test_a_model_whose_tasks_choose_no_experts_is_told_in_one_line(
    run: Path, layers: tuple[ExpertLayerInfo, ...], reason: str
) -> None:
    (run / "routing" / "step_00000040.json").write_text(json.dumps(RoutingLedger(layers, TASKS).to_json()))
    lines = [json.dumps({**step_line(step), "mutual_information": {}}) for step in range(1, 41)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(run)
    text = text_of(page)
    assert reason in text
    assert "Which tasks are alike" not in text
    assert "Mutual information rises" not in text
    assert {path.name for path in page.parent.glob("*.png")} == {"progress.png", "task_losses.png"}


def test_one_task_alone_has_no_affinity_and_no_conflict(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "tasks": ["normal"]}))
    ledger = RoutingLedger(LAYERS, ["normal"])
    for layer in LAYERS:
        ledger.counts[layer.name] = torch.tensor([[5, 5, 0, 0]])
        ledger.tokens[layer.name] = torch.tensor([5])
    (run / "routing" / "step_00000040.json").write_text(json.dumps(ledger.to_json()))
    page = write_report(run)
    text = text_of(page)
    assert "Which task uses which experts" in text
    assert "Which tasks are alike" not in text
    assert "Where tasks pull against each other" not in text
    assert (page.parent / "experts.png").exists()


def test_a_damaged_file_stops_the_report_and_leaves_the_old_one(run: Path) -> None:
    page = write_report(run)
    before = page.read_bytes()
    (run / "metrics.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1"):
        write_report(run)
    assert page.read_bytes() == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
