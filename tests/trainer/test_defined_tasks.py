"""A user's own tasks the whole way: defined once where the data is described, known to everything that follows."""

import json
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from typer.testing import CliRunner

from cluster.env import RankEnv
from configs.errors import UserError
from configs.load import load_config
from data_pipeline.check import check_shards
from data_pipeline.index import ShardIndex
from trainer.cli.main import app
from trainer.engine import close_distributed
from trainer.evaluation.evaluate import evaluate_run
from trainer.loop import Trainer
from trainer.progress import PlainProgress
from trainer.recipes import load_recipe
from trainer.squads.export import load_squad

SIDE = 32
SKIES = ("sun", "rain", "snow")
DESCRIPTION = """
define_tasks:
  lanes: {like: semseg, class_names: [road, lane, curb]}
  weather: {like: class_scene, class_names: [sun, rain, snow]}
  far_depth: {like: depth_zbuffer, codes_per_metre: 64}
table: images.csv
rgb: "{file}.png"
labels:
  lanes:
    path: "{file}_lanes.png"
    map: {0: road, 7: lane, 9: curb}
  weather: {value: sky}
  far_depth: {path: "{file}_metres.npy"}
split: {field: part}
"""
RECIPE = """
tasks: [lanes, weather, far_depth]
model: {width: 32, depth: 2, heads: 2, patch_size: 8, attention_experts: 4, attention_top_k: 2, mlp_experts: 4,
        mlp_top_k: 2, placement: every}
data: {image_size: 32, workers: 0, train: SHARDS/train, val: SHARDS/val}
optim: {warmup_steps: 1}
train: {steps: 4, images_per_step: 4, log_every_steps: 1}
parallel: {timeout_seconds: 60}
checkpoint: {every_steps: 2}
"""


def call(*arguments: str | Path) -> str:
    """Run a `modsquad` command in this process."""
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def write_street(folder: Path) -> None:
    """Write 24 images: a band of lane between road and curb, a sky, and depths up to 900 m."""
    folder.mkdir()
    random = np.random.default_rng(0)
    lines = ["file,sky,part"]
    for number in range(24):
        ids = np.zeros((SIDE, SIDE), np.uint8)
        ids[10 + number % 5 : 20] = 7
        ids[20:] = 9
        rgb = random.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        rgb[..., 0] = ids * 20
        Image.fromarray(rgb).save(folder / f"{number:02d}.png")
        Image.fromarray(ids).save(folder / f"{number:02d}_lanes.png")
        np.save(folder / f"{number:02d}_metres.npy", np.linspace(1.0, 900.0, SIDE * SIDE).reshape(SIDE, SIDE))
        lines.append(f"{number:02d},{SKIES[number % 3]},{'val' if number >= 16 else 'train'}")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    (folder / "own.yaml").write_text(DESCRIPTION)


def train(recipe: Path, *overrides: str) -> str:
    """Train in this process; return what was said."""
    said = StringIO()
    try:
        Trainer(load_recipe(recipe, overrides), RankEnv(), PlainProgress(Console(file=said, width=400), 4)).fit()
    finally:
        close_distributed()
    return said.getvalue()


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with street/, shards/, recipe.yaml and a run of four steps."""
    folder = tmp_path_factory.mktemp("road")
    write_street(folder / "street")
    for part in ("train", "val"):
        call("data", "pack", "folder", folder / "street" / "own.yaml", folder / "shards" / part, "--split", part,
             "--size", str(SIDE), "--workers", "1")  # fmt: skip
    (folder / "recipe.yaml").write_text(RECIPE.replace("SHARDS", str(folder / "shards")))
    train(folder / "recipe.yaml", f"run_dir={folder / 'run'}")
    evaluate_run(folder / "run")
    return folder


@pytest.fixture
def alone() -> Iterator[RankEnv]:
    yield RankEnv()
    close_distributed()


def test_shards_say_what_was_packed(road: Path) -> None:
    index = ShardIndex.load(road / "shards" / "train")
    assert index.tasks == ("far_depth", "lanes", "weather")
    head = json.loads((road / "shards" / "train" / "index.json").read_text())
    assert head["define_tasks"]["weather"] == {"like": "class_scene", "class_names": [*SKIES]}
    lanes, weather, depth = (index.task_table[name] for name in ("lanes", "weather", "far_depth"))
    assert set(np.unique(index.label(0, lanes))) == {0, 1, 2}
    assert [index.label(number, weather).argmax() for number in range(4)] == [0, 1, 2, 0]
    assert index.label(0, depth)[0, 0] == 64
    assert index.label(0, depth)[-1, -1] == 900 * 64


def test_check_and_show_know_them(road: Path, tmp_path: Path) -> None:
    rows = {row.task: row for row in check_shards(road / "shards" / "val").tasks}
    assert rows.keys() == {"lanes", "weather", "far_depth"}
    assert (rows["lanes"].low, rows["lanes"].high) == (0.0, 2.0)
    call("data", "show", road / "shards" / "train", tmp_path / "sheet.png", "--count", "2")
    call("data", "show", road / "shards" / "train", tmp_path / "one.png", "--count", "2", "--tasks", "weather")
    sizes = [Image.open(tmp_path / name).width for name in ("sheet.png", "one.png")]
    assert sizes == [4 * 134 + 6, 2 * 134 + 6]


def test_a_run_holds_the_definitions_that_its_recipe_left_to_the_shards(road: Path) -> None:
    config = load_config(road / "run")
    assert config.define_tasks["lanes"].class_names == ("road", "lane", "curb")
    assert [spec.channels for spec in config.task_specs] == [3, 3, 1]
    scores = json.loads(next((road / "run" / "evaluation").glob("*_val.json")).read_text())["tasks"]
    assert {name: score["metric"] for name, score in scores.items()} == {
        "lanes": "miou", "weather": "accuracy", "far_depth": "abs_rel",
    }  # fmt: skip
    assert all(score["value"] is not None for score in scores.values())
    assert scores["far_depth"]["all"]["rmse_m"]["constant"] > 128.0, "in metres, of which there are 900"


def test_a_run_goes_on_and_only_with_the_same_definitions(road: Path, tmp_path: Path) -> None:
    shutil.copytree(road / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    place = f"run_dir={tmp_path / 'run'}"
    depth = "define_tasks.far_depth={like: depth_zbuffer, codes_per_metre: 64, loss: %s}"
    with pytest.raises(UserError, match=r"holds a run with another define_tasks\.far_depth\.loss: set what"):
        train(road / "recipe.yaml", place, depth % "l2")
    train(road / "recipe.yaml", place, depth % "l1")  # as it is without being said
    assert (tmp_path / "run" / "checkpoints" / "step_00000004").is_dir()


def test_squads_and_their_graphs_carry_them(road: Path, tmp_path: Path) -> None:
    call("extract", road / "run", "--task", "weather,far_depth", "--out", tmp_path / "squad")
    squad = load_squad(tmp_path / "squad")
    assert squad.tasks == tuple(load_config(road / "run").task_table[name] for name in ("weather", "far_depth"))
    call("export", tmp_path / "squad", "--out", tmp_path / "squad.pt2")
    files = {"modsquad.json": ""}
    torch.export.load(tmp_path / "squad.pt2", extra_files=files)
    told = json.loads(json.loads(files["modsquad.json"])["tasks"])
    assert told["weather"]["class_names"] == [*SKIES]
    assert told["far_depth"]["codes_per_metre"] == 64
    call("predict", tmp_path / "squad", road / "street" / "00.png", "--out", tmp_path / "seen", "--tasks", "weather")
    assert np.load(tmp_path / "seen" / "00.weather.npy").shape == (3,)


def test_an_exported_model_carries_them_and_starts_a_run_with_new_ones(road: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    call("export", road / "run", "--out", file)
    with safe_open(file, framework="pt") as opened:
        assert "define_tasks" in opened.metadata()["config"]
    call("predict", file, road / "street" / "01.png", "--out", tmp_path / "seen")
    assert np.load(tmp_path / "seen" / "01.lanes.npy").shape == (3, SIDE, SIDE)
    assert (tmp_path / "seen" / "01.weather.png").is_file()

    start = (f"run_dir={tmp_path / 'next'}", f"train.init_from={file}", "train.steps=1", "checkpoint.every_steps=1")
    kinds = "define_tasks.kinds={like: semseg, class_names: [drivable, other]}"
    unserved = "data.task_shares.kinds=0"  # these shards have no labels of it
    said = train(road / "recipe.yaml", *start, kinds, unserved, "tasks=[weather, kinds]").splitlines()
    assert [line.split(maxsplit=1) for line in said[2:4]] == [
        ["weather", "routers, embedding and head taken"], ["kinds", "new"],
    ]  # fmt: skip


def test_a_head_of_other_classes_under_the_same_name_is_refused(road: Path, tmp_path: Path, alone: RankEnv) -> None:
    file = tmp_path / "model.safetensors"
    call("export", road / "run", "--out", file)
    shards = road / "street" / "own.yaml"
    text = shards.read_text().replace("[road, lane, curb]", "[curb, lane, road]")
    (road / "street" / "turned.yaml").write_text(text)
    call("data", "pack", "folder", road / "street" / "turned.yaml", tmp_path / "turned", "--split", "train",
         "--size", str(SIDE), "--workers", "1")  # fmt: skip
    places = (f"data.train={tmp_path}/turned", f"data.val={tmp_path}/turned", f"run_dir={tmp_path}/run")
    with pytest.raises(UserError, match="its task 'lanes' has another `class_names`, so its head means something else"):
        Trainer(load_recipe(road / "recipe.yaml", [*places, f"train.init_from={file}"]), alone)


@pytest.mark.parametrize(
    ("definition", "key"),
    [
        ("{like: semseg, class_names: [road, lane]}", "class_names"),
        ("{like: semseg, class_names: [lane, road, curb]}", "class_names"),
        ("{like: semseg, class_names: [road, lane, curb], invalid: 77}", "invalid"),
        ("{like: depth_zbuffer}", "like"),
    ],
)
def test_a_recipe_that_contradicts_its_shards_is_refused(
    definition: str, key: str, road: Path, tmp_path: Path, alone: RankEnv
) -> None:
    config = load_recipe(road / "recipe.yaml", [f"define_tasks.lanes={definition}", f"run_dir={tmp_path}/run"])
    message = rf"shards/train/index\.json: task 'lanes' was packed with another `{key}` than the configuration says"
    with pytest.raises(UserError, match=message):
        Trainer(config, alone)


def test_a_recipe_may_repeat_a_definition_and_say_how_it_is_trained(road: Path, tmp_path: Path) -> None:
    near = "define_tasks.far_depth={like: depth_zbuffer, codes_per_metre: 64, loss: l2, metrics: [rmse_m]}"
    train(road / "recipe.yaml", near, f"run_dir={tmp_path}/run", "train.steps=1", "tasks=[far_depth]")
    scores = json.loads(next((tmp_path / "run" / "evaluation").glob("*_val.json")).read_text())["tasks"]
    assert scores["far_depth"]["metric"] == "rmse_m"


def test_reports_costs_and_conflicts_know_them(road: Path, tmp_path: Path) -> None:
    call("conflict", road / "run", "--images", "4")
    call("report", road / "run")
    page = (road / "run" / "report" / "index.html").read_text()
    assert "weather" in page
    assert "far_depth" in page
    shutil.copytree(road / "run", tmp_path / "other")
    assert "lanes" in call("compare", road / "run", tmp_path / "other", "--out", tmp_path / "compare")
    call("plan", road / "recipe.yaml", "--nodes", "1", "--gpus-per-node", "1")
    assert "define_tasks:" in call("train", road / "recipe.yaml", "--print")


def test_a_task_that_neither_recipe_nor_shards_define_is_named(road: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"override 'tasks=\[wether\]': tasks: unknown task 'wether': did you mean 'weather'\?.*, nor do the "
        "training shards define it",
    ):
        load_recipe(road / "recipe.yaml", ["tasks=[wether]"])
    with pytest.raises(UserError, match=r"unknown task 'lanes'.*, nor do the training shards define it: .*/absent"):
        load_recipe(road / "recipe.yaml", ["data.train=/absent"])


def test_shards_of_another_program_are_indexed_with_definitions(road: Path, tmp_path: Path) -> None:
    for source in (road / "shards" / "train").glob("*.tar"):
        shutil.copy(source, tmp_path)
    call("data", "index", tmp_path)
    assert ShardIndex.load(tmp_path).tasks == ()
    definitions = road / "street" / "own.yaml"
    config = load_recipe(road / "recipe.yaml")
    with pytest.raises(UserError, match=r"does not say what 'lanes' is.*modsquad data index .* --define RECIPE"):
        ShardIndex.load(tmp_path).check_tasks(config.task_specs)
    call("data", "index", tmp_path, "--define", definitions)
    index = ShardIndex.load(tmp_path)
    index.check_tasks(config.task_specs)
    assert index.tasks == ("far_depth", "lanes", "weather")


def test_an_index_with_a_wrong_definition_is_refused(road: Path, tmp_path: Path) -> None:
    shutil.copytree(road / "shards" / "val", tmp_path / "val")
    path = tmp_path / "val" / "index.json"
    path.write_text(path.read_text().replace('"like":"semseg"', '"like":"semsegs"'))
    with pytest.raises(UserError, match=r"not an index that this version reads \(define_tasks\.lanes: .*did you mean"):
        ShardIndex.load(tmp_path / "val")
