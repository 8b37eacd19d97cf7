"""Squads as ONNX and torch.export files: read back by other programs, they predict the same."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import trainer.squads.portable
from configs.errors import UserError
from model.extract import SquadModel, extract_squad
from model.portable import trace_squad
from model.router import TaskRouter
from tests.model import models
from tests.trainer.run_folder import squad_summary
from tests.trainer.tiny_run import tiny_config, tiny_model
from trainer.cli.main import app
from trainer.squads.export import load_squad, save_squad
from trainer.squads.portable import DESCRIPTION_FILE, description, save_portable

TASKS = ["normal", "class_scene"]


def squad_of(variant: str) -> SquadModel:
    built = models.model(**models.VARIANTS[variant])
    return extract_squad(built, TASKS, {layer.name: [0, 1, 3] for layer in built.expert_layers})


@torch.no_grad()
def check(path: Path, squad: SquadModel) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    side = squad.image_size
    assert [(x.name, x.shape, x.type) for x in session.get_inputs()] == [
        ("images", ["batch", 3, side, side], "tensor(float)")
    ]
    assert {x.name: x.shape for x in session.get_outputs()} == {
        task.name: ["batch", task.channels, side, side] if task.dense else ["batch", task.channels]
        for task in squad.tasks
    }
    names = [task.name for task in squad.tasks]
    for count in (1, 3):
        images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(4)) * 2 - 1
        found = dict(zip(names, session.run(names, {"images": images.numpy()}), strict=True))
        for task, expected in squad(images).items():
            torch.testing.assert_close(torch.from_numpy(found[task]), expected, atol=1e-4, rtol=0)


def test_onnx_of_tasks_that_share_a_trunk(tmp_path: Path) -> None:
    squad, out = squad_of("shared"), tmp_path / "new folder" / "squad.onnx"
    assert save_portable(squad, out) < 1e-4
    check(out, squad)
    metadata = onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
    assert metadata == description(squad)
    assert (metadata["modsquad"], metadata["image_size"]) == (version("modsquad"), "16")
    tasks = json.loads(metadata["tasks"])
    assert list(tasks) == TASKS
    assert tasks["normal"]["target"] == "unit_vector"
    assert str(Path.cwd()).encode() not in out.read_bytes()


def test_onnx_breaks_ties_by_index_and_rests_experts_without_tokens(tmp_path: Path) -> None:
    squad = squad_of("every")
    for part in squad.modules():
        if isinstance(part, TaskRouter):
            nn.init.zeros_(part.weight)
    save_portable(squad, tmp_path / "squad.onnx")
    check(tmp_path / "squad.onnx", squad)


def test_pt2_says_what_it_is(tmp_path: Path) -> None:
    squad, out = squad_of("dense"), tmp_path / "squad.pt2"
    assert save_portable(squad, out) < 1e-4
    files = {DESCRIPTION_FILE: ""}
    loaded = torch.export.load(out, extra_files=files).module()
    images = models.images(3)
    expected: dict[str, Tensor] = squad(images)
    assert all(torch.allclose(prediction, expected[task], atol=1e-4) for task, prediction in loaded(images).items())
    assert json.loads(files[DESCRIPTION_FILE]) == description(squad)


def test_the_command(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(tmp_path))
    kept = {layer.name: [1, 2] for layer in model.expert_layers}
    save_squad(tmp_path / "squad", extract_squad(model, ["depth_zbuffer"], kept), squad_summary())
    out = tmp_path / "depth.onnx"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "squad"), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "within " in done.output
    assert "of the squad on 3 random images" in " ".join(done.output.split())
    check(out, load_squad(tmp_path / "squad"))


def test_a_file_that_predicts_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squad, other = squad_of("dense"), squad_of("dense")
    with torch.no_grad():
        other.backbone.position[3, 1] += 0.1
    monkeypatch.setattr(trainer.squads.portable, "trace_squad", lambda _: trace_squad(other))
    with pytest.raises(RuntimeError, match=r"squad\.pt2 would differ from the squad by \d\.\de-\d\d, more than 1e-04"):
        save_portable(squad, tmp_path / "squad.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named_with_their_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"the package {package}: install the extra 'onnx'"):
        save_portable(squad_of("dense"), tmp_path / "squad.onnx")


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"choose \.safetensors for a run, \.onnx or \.pt2 for a squad"):
        CliRunner().invoke(app, ["export", str(tmp_path), "--out", "squad.pb"], catch_exceptions=False)
