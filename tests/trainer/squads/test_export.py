import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from configs.errors import UserError
from configs.load import dump_config
from model.extract import SquadModel, extract_squad
from tests.trainer.run_folder import squad_summary
from tests.trainer.tiny_run import SIDE, TASKS, tiny_config, tiny_model
from trainer.squads.export import (
    CURVE_FILE,
    CURVE_PICTURE,
    SQUAD_FILE,
    SQUAD_WEIGHTS,
    export_model,
    load_exported,
    load_run_model,
    load_squad,
    save_model,
    save_squad,
)
from trainer.squads.extraction import read_summary


@pytest.fixture
def squad(tmp_path: Path) -> SquadModel:
    model = tiny_model(tiny_config(tmp_path))
    return extract_squad(model, ["normal", "class_scene"], {layer.name: [1, 3] for layer in model.expert_layers})


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_run_of_two_ranks_loads_whole_in_one_process(tiny_run: Path) -> None:
    model, config, step = load_run_model(tiny_run)
    assert step == 7
    assert config == tiny_config(tiny_run, ep_size=2)
    assert not model.training
    assert_same_weights(model, tiny_model(config))


def test_an_exported_model_says_what_it_is_and_loads_back(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "model.safetensors"
    export_model(tiny_run, out)
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["config"] == dump_config(tiny_config(tiny_run, ep_size=2))
    assert json.loads(metadata["tasks"]) == list(TASKS)
    model, config, step = load_exported(out)
    assert (config, step) == (tiny_config(tiny_run, ep_size=2), 7)
    assert_same_weights(model, load_run_model(tiny_run)[0])


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config(tmp_path)))
    with pytest.raises(UserError, match="no intact checkpoint"):
        load_run_model(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tiny_run / "checkpoints")
    fewer = tiny_config(tiny_run).model_copy(update={"tasks": TASKS[1:]})
    (tmp_path / "config.yaml").write_text(dump_config(fewer))
    with pytest.raises(UserError, match=r"checkpoint of step 7 .* does not fit its configuration"):
        load_run_model(tmp_path)


def test_a_squad_loads_back_exactly(squad: SquadModel, tmp_path: Path) -> None:
    save_squad(tmp_path / "squad", squad, squad_summary())
    loaded = load_squad(tmp_path / "squad")
    assert not loaded.training
    assert loaded.kept == squad.kept
    assert loaded.tasks == squad.tasks
    assert_same_weights(loaded, squad)
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected, found = squad(images), loaded(images)
    assert list(found) == list(expected) == ["normal", "class_scene"]
    assert all(torch.equal(found[task], expected[task]) for task in expected)
    assert read_summary(tmp_path / "squad") == squad_summary()


def test_squads_run_without_deepspeed(squad: SquadModel, tmp_path: Path) -> None:
    save_squad(tmp_path, squad, squad_summary())
    code = (
        "import sys, pathlib, torch; from trainer.squads.export import load_squad; "
        f"squad = load_squad(pathlib.Path(sys.argv[1])); print(*squad(torch.zeros(1, 3, {SIDE}, {SIDE}))); "
        "assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["normal", "class_scene"]


def test_a_squad_is_as_readable_as_any_new_file(squad: SquadModel, tmp_path: Path) -> None:
    save_squad(tmp_path, squad, squad_summary())
    (tmp_path / "plain").touch()
    assert (tmp_path / SQUAD_WEIGHTS).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_metric_that_could_not_be_computed_is_null_on_disk(squad: SquadModel, tmp_path: Path) -> None:
    summary = squad_summary()
    unknown = summary.scores[0].model_copy(update={"before": math.nan})
    save_squad(tmp_path, squad, summary.model_copy(update={"scores": (unknown,)}))
    assert json.loads((tmp_path / SQUAD_FILE).read_text())["scores"][0]["before"] is None
    read = read_summary(tmp_path)
    assert read is not None
    assert math.isnan(read.scores[0].before)
    assert math.isnan(read.scores[0].relative_change)


def test_a_new_squad_removes_the_curve_of_the_old_one(squad: SquadModel, tmp_path: Path) -> None:
    for name in (CURVE_FILE, CURVE_PICTURE):
        (tmp_path / name).write_text("")
    save_squad(tmp_path, squad, squad_summary())
    assert sorted(path.name for path in tmp_path.iterdir()) == [SQUAD_FILE, SQUAD_WEIGHTS]


def test_an_interrupted_overwrite_leaves_no_complete_squad(
    squad: SquadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_squad(tmp_path, squad, squad_summary())

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.squads.export.save_file", fail)
    with pytest.raises(UserError, match=r"squad\.safetensors: No space left on device"):
        save_squad(tmp_path, squad, squad_summary())
    assert read_summary(tmp_path) is None


def test_damaged_squads_are_named(squad: SquadModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no squad"):
        load_squad(tmp_path)
    save_squad(tmp_path, squad, squad_summary())
    weights = tmp_path / SQUAD_WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"squad\.safetensors is damaged"):
        load_squad(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        load_squad(tmp_path)
    (tmp_path / SQUAD_FILE).write_text('{"format": "modsquad.squad.9"}')
    with pytest.raises(UserError, match=r"has format 'modsquad\.squad\.9'"):
        load_squad(tmp_path)
    (tmp_path / SQUAD_FILE).write_text('{"format": "modsquad.squad.2"}')
    with pytest.raises(UserError, match="no squad description"):
        load_squad(tmp_path)
    (tmp_path / SQUAD_FILE).write_text("[]")
    with pytest.raises(UserError, match="does not describe a squad"):
        load_squad(tmp_path)
    for damaged in (b"{", b"\x80\xff", b""):
        (tmp_path / SQUAD_FILE).write_bytes(damaged)
        with pytest.raises(UserError, match=r"not valid JSON|not UTF-8"):
            load_squad(tmp_path)


@settings(max_examples=80, deadline=None)
@given(
    path=st.sampled_from(
        [["tasks"], ["image_size"], ["kept"], ["kept", "blocks.1.mlp"], ["model"], ["model", "depth"]]
    ),
    value=st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.text(max_size=3)
    | st.lists(st.integers(-1, 5) | st.text(max_size=2) | st.lists(st.none(), max_size=1), max_size=3)
    | st.dictionaries(st.text(max_size=2), st.integers(0, 3), max_size=2),
)
def test_any_wrong_description_is_one_line(path: list[str], value: Any) -> None:
    model = tiny_model(tiny_config(Path("unused")))
    spec = extract_squad(model, ["normal"], {layer.name: [1, 3] for layer in model.expert_layers}).spec()
    spec = json.loads(json.dumps(spec))
    part = spec
    for key in path[:-1]:
        part = part[key]
    assume(part[path[-1]] != value)
    part[path[-1]] = value
    message = ""
    try:
        SquadModel.from_spec(spec)
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def test_a_squad_is_no_exported_model(squad: SquadModel, tmp_path: Path) -> None:
    save_squad(tmp_path, squad, squad_summary())
    with pytest.raises(UserError, match=r"has format 'modsquad\.squad\.2', expected modsquad\.model\.1"):
        load_exported(tmp_path / SQUAD_WEIGHTS)


def test_a_file_in_the_place_of_the_squad_s_folder_is_named(squad: SquadModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file: Not a directory"):
        save_squad(tmp_path / "file", squad, squad_summary())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"config": "model: {depth: deep, width: -1}", "step": "1"},
            r"does not fit this program: model\.\w+: [^\n]+\Z",
        ),
        (
            {"config": "tasks: [nothing]", "step": "1"},
            r"does not fit this program: [^\n]*unknown task 'nothing'[^\n]*\Z",
        ),
        ({"config": "a: [", "step": "1"}, r"does not fit this program: [^\n]+\Z"),
        ({"config": "{}"}, "metadata lacks 'step'"),
    ],
)
def test_an_exported_model_of_another_program_is_refused_in_one_line(
    metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "modsquad.model.1", **metadata})
    with pytest.raises(UserError, match=message):
        load_exported(path)


def test_an_exported_model_is_replaced_only_by_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    out = tmp_path / "model.safetensors"
    save_model(out, tiny_model(config), config, 7)
    before = out.read_bytes()

    def write_half(_: object, path: Path, **__: object) -> None:
        path.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.squads.export.save_file", write_half)
    with pytest.raises(UserError, match="No space left on device"):
        save_model(out, tiny_model(config), config, 8)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
