"""Real photos and labels through the whole road: description, shards, check, contact sheet, index, loader, training."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from typer.testing import CliRunner

from cluster.env import RankEnv
from configs.load import load_config
from configs.tasks import TASKS as ROWS
from data_pipeline.index import ShardIndex
from data_pipeline.show import load_target
from data_pipeline.sources.folder_arrays import read_array
from data_pipeline.sources.folder_labels import DepthLabel
from data_pipeline.sources.folder_source import FolderSource
from data_pipeline.sources.raw_file import RawFile
from data_pipeline.sources.squares import square_nearest
from data_pipeline.targets import depth_metres
from tests.data_pipeline.real_photos import (
    BASELINE_METRES,
    DISPARITY_OFFSET,
    FOCAL_PIXELS,
    TASKS,
    Photo,
    depth_of,
    photos,
    write_photos,
)
from trainer.cli.data import app
from trainer.engine import close_distributed
from trainer.loop import Trainer

SIZE = 96
GEOMETRY = {"depth_zbuffer", "normal"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the photos, their description and, by the command line, their shards."""
    folder = tmp_path_factory.mktemp("real photos")
    description = write_photos(folder)
    run("pack", "folder", description, folder / "shards", "--size", SIZE, "--workers", 1, "--samples-per-shard", 4)
    return folder


@pytest.fixture(scope="module")
def index(folder: Path) -> ShardIndex:
    return ShardIndex.load(folder / "shards")


def run(*arguments: str | Path | int) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def number_of(index: ShardIndex, name: str) -> int:
    return next(number for number in range(len(index)) if index.meta(number)["name"] == name)


def photo_and_number(index: ShardIndex, name: str) -> tuple[Photo, int]:
    return photos()[name], number_of(index, name)


def test_every_photo_has_the_labels_that_its_scene_has(folder: Path, index: ShardIndex) -> None:
    here = {index.meta(number)["name"]: number for number in range(len(index))}
    assert set(here) == set(photos())
    for name, photo in photos().items():
        expected = {"class_scene", "segment_unsup2d"}
        expected |= GEOMETRY if photo.depth is not None else set()
        expected |= {"edges", "saliency"} if photo.objects is not None else set()
        expected |= {"semseg"} if photo.classes is not None else set()
        assert {task for task in TASKS if index.has(here[name], task)} == expected, name
        meta = index.meta(here[name])
        assert (meta["height"], meta["width"]) == photo.rgb.shape[:2]
    assert (folder / "shards" / "problems.jsonl").read_text() == ""


def test_depth_is_that_of_the_nearest_pixel_and_unknown_where_the_camera_saw_none(index: ShardIndex) -> None:
    for name in ("shelf/whole", "shelf/cut off", "garage/cut"):
        photo, number = photo_and_number(index, name)
        assert photo.depth is not None
        depth = square_nearest(photo.depth, SIZE)
        codes = index.label(number, ROWS["depth_zbuffer"])
        np.testing.assert_array_equal(codes == 65535, ~np.isfinite(depth))
        target = load_target(index, number, ROWS["depth_zbuffer"])
        known = target.mask[0, 0].numpy()
        assert not known[~np.isfinite(depth)].any()
        metres = depth_metres(ROWS["depth_zbuffer"], target.values[0, 0]).numpy()
        np.testing.assert_allclose(metres[known], depth[known], atol=1 / 1024 + 1e-4)
    shelf = load_target(index, number_of(index, "shelf/whole"), ROWS["depth_zbuffer"]).mask.float().mean().item()
    assert 0.3 < shelf < 0.6


def test_normals_face_the_camera_in_the_axes_of_taskonomy(index: ShardIndex) -> None:
    """x left, y up, z away: what faces the camera has a negative z, a floor a positive y."""
    target = load_target(index, number_of(index, "garage/whole"), ROWS["normal"])
    x, y, z = (channel[target.mask[0, 0]] for channel in target.values[0])
    assert (z < 0).float().mean() > 0.95
    floor = target.values[0, 1, -SIZE // 8 :][target.mask[0, 0, -SIZE // 8 :]]
    assert floor.median() > 0.8
    assert abs(x.mean()) < 0.3
    assert y.mean() > 0.1


def test_classes_and_borders_are_those_of_the_pixels(index: ShardIndex) -> None:
    photo, number = photo_and_number(index, "Straßenfest/Ausschnitt ä")
    assert photo.classes is not None
    assert photo.objects is not None
    np.testing.assert_array_equal(index.label(number, ROWS["semseg"]), square_nearest(photo.classes, SIZE))
    objects = square_nearest(photo.objects, SIZE).astype(int)
    np.testing.assert_array_equal(index.label(number, ROWS["saliency"]) == 255, objects > 0)
    edges = index.label(number, ROWS["edges"]) == 255
    np.testing.assert_array_equal(
        edges[:-1, :-1], (objects[1:, :-1] != objects[:-1, :-1]) | (objects[:-1, 1:] != objects[:-1, :-1])
    )
    assert index.label(number, ROWS["class_scene"]).argmax() == 30


def test_disparities_need_no_code_to_become_depths() -> None:
    path = Path(skimage.__file__).parent / "data" / "motorcycle_disp.npz"
    disparity = read_array(RawFile(str(path)))
    label = DepthLabel(path="x", unit_metres=FOCAL_PIXELS * BASELINE_METRES, offset=DISPARITY_OFFSET, inverse=True)
    found = label.convert(ROWS["depth_zbuffer"], disparity)
    depth = depth_of(disparity.astype(np.float64))
    assert found.known is not None
    np.testing.assert_array_equal(found.known, np.isfinite(depth))
    np.testing.assert_array_equal(found.codes[found.known], np.rint(depth[found.known] * 512))
    assert 1.9 < depth[found.known].min() < depth[found.known].max() < 5.2


def test_check_and_contact_sheet(folder: Path) -> None:
    report = run("check", folder / "shards")
    assert f"6 samples of {SIZE} x {SIZE} pixels in 2 shards" in report
    assert all(task in report for task in TASKS)
    run("show", folder / "shards", folder / "sheet.png", "--count", 6)
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.size == ((len(TASKS) + 1) * 134 + 6, 20 + 6 * 134 + 6)


def test_the_same_index_is_built_for_the_tars_alone(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "shards").glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run("index", tmp_path)
    assert ShardIndex.load(tmp_path).fingerprint == ShardIndex.load(folder / "shards").fingerprint


@pytest.fixture
def alone() -> Iterator[RankEnv]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield RankEnv()
    close_distributed()
    torch.set_num_threads(threads)


def test_two_steps_of_training(folder: Path, alone: RankEnv) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
run_dir: {folder}/run
tasks: [{", ".join(TASKS)}]
model: {{width: 32, depth: 2, heads: 2, patch_size: 8, attention_experts: 4, attention_top_k: 2, mlp_experts: 4,
        mlp_top_k: 2, placement: every}}
data: {{train: {folder}/shards, val: {folder}/shards, image_size: 32, workers: 0}}
optim: {{lr: 0.001, warmup_steps: 1}}
train: {{steps: 2, images_per_step: 6, log_every_steps: 1}}
""",
        encoding="utf-8",
    )
    Trainer(load_config(recipe), alone).fit()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2]
    for line in losses:
        assert np.isfinite(line["loss"])


def test_the_source_yields_what_the_shards_hold(folder: Path, index: ShardIndex) -> None:
    source = FolderSource(folder / "real.yaml", SIZE)
    for sample in (source[number] for number in range(len(source))):
        number = number_of(index, str(sample.meta["name"]))
        assert index.keys[number] == sample.key
        np.testing.assert_array_equal(index.image(number), sample.rgb)
