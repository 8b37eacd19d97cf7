"""Official layouts to samples: files joined by view, codes intact, what is damaged listed and never used."""

import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from configs.errors import UserError
from configs.tasks import TASKS, resolve_tasks
from data_pipeline.check import check_shards
from data_pipeline.index import ShardIndex
from data_pipeline.pack import pack
from data_pipeline.source import PartialSample
from data_pipeline.sources.taskonomy import TaskonomySource
from data_pipeline.sources.taskonomy_splits import PartName, Split
from tests.data_pipeline.taskonomy_tree import LAYOUTS, depth, rgb, write, write_view

ALL = resolve_tasks("taskonomy")
DEPTH_AND_SCENE = resolve_tasks(["depth_zbuffer", "class_scene"])
REAL = Path(__file__).parents[3].parent / "shared" / "real_samples"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_of_folders(tmp_path: Path, layout: str) -> None:
    for point, view in ((10, 2), (9, 0), (10, 11)):
        write_view(tmp_path, layout, point, view)
    source = TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE)
    samples = [source[index] for index in range(len(source))]
    building = {"components": "taskonomy/allensville/", "one building": ""}.get(layout, "allensville/")
    assert [sample.key for sample in samples] == [
        f"{building}point_{place}" for place in ("9_view_0", "10_view_2", "10_view_11")
    ]
    for sample in samples:
        np.testing.assert_array_equal(sample.rgb, rgb())
        np.testing.assert_array_equal(sample.labels["depth_zbuffer"], depth())
        assert sample.labels["class_scene"].shape == (365,)
        assert sample.labels["class_scene"].dtype == np.float32
        assert sample.mask_valid is not None
        np.testing.assert_array_equal(sample.mask_valid == 0, depth() == 65535)


def test_tars_are_read_in_place(tmp_path: Path) -> None:
    write_view(tmp_path / "raw", "one building", 3, 4)
    root = tmp_path / "tars"
    root.mkdir()
    for domain in ("rgb", "depth_zbuffer", "class_scene"):
        with tarfile.open(root / f"allensville_{domain}.tar", "w") as tar:
            tar.add(tmp_path / "raw" / domain, domain)
    source = TaskonomySource(root, 12, DEPTH_AND_SCENE)
    (sample,) = (source[index] for index in range(len(source)))
    assert sample.key == "allensville/point_3_view_4"
    np.testing.assert_array_equal(sample.labels["depth_zbuffer"], depth())
    assert set(sample.labels) == {"depth_zbuffer", "class_scene"}


def test_a_cut_tar_is_refused(tmp_path: Path) -> None:
    write_view(tmp_path / "raw", "one building", 3, 4)
    path = tmp_path / "allensville_rgb.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "raw" / "rgb", "rgb")
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match=r"allensville_rgb\.tar.*truncated"):
        TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE)


def test_a_split_takes_its_part_alone_and_names_what_is_missing(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for building in ("hanson", "merom", "corozal"):
        for layout in ("components", "buildings"):
            for domain, place in LAYOUTS[layout].items():
                name = f"point_1_view_{int(layout == 'buildings')}_domain_{domain}.png"
                if domain == "rgb":
                    write(raw / place.replace("allensville", building).format(name), rgb())
    with tarfile.open(raw / "ihlen_rgb.tar", "w") as tar:
        tar.add(raw / "rgb" / "merom", "rgb")
    parts: dict[PartName, tuple[str, ...]] = {
        "train": ("merom", "ihlen", "pinesdale"),
        "val": ("corozal", "darden"),
        "test": ("hanson",),
    }
    source = TaskonomySource(raw, 12, DEPTH_AND_SCENE, split=Split("tiny", "train", parts))
    report = pack(source, tmp_path / "out", facts=source.facts)
    keys = ShardIndex.load(tmp_path / "out").keys
    assert keys == ("ihlen/point_1_view_1", "merom/point_1_view_1", "taskonomy/merom/point_1_view_0")
    (problem,) = report.problems
    assert (problem.key, problem.task) == ("pinesdale", "")
    assert "no file of it" in problem.reason
    facts = check_shards(tmp_path / "out").facts
    assert facts == source.facts
    for line in ("train: 3 buildings listed (published: 25), 2 of", "val: 2 buildings listed (published: 5), 1 of"):
        assert any(fact.startswith(line) for fact in facts)
    assert TaskonomySource(raw, 12, DEPTH_AND_SCENE, split=Split("tiny", "val", parts)).name != source.name


def test_a_cut_tar_of_another_part_is_not_opened(tmp_path: Path) -> None:
    write_view(tmp_path, "buildings", 1, 0)
    (tmp_path / "hanson_rgb.tar").write_bytes(b"cut")
    parts: dict[PartName, tuple[str, ...]] = {"train": ("allensville",), "val": ("hanson",), "test": ()}
    assert len(TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE, split=Split("tiny", "train", parts))) == 1
    with pytest.raises(UserError, match=r"hanson_rgb\.tar.*truncated"):
        TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE, split=Split("tiny", "val", parts))


def test_a_folder_with_no_building_of_the_part(tmp_path: Path) -> None:
    parts: dict[PartName, tuple[str, ...]] = {"train": ("hanson",), "val": (), "test": ()}
    write_view(tmp_path / "other", "buildings", 1, 0)
    with pytest.raises(UserError, match=r"none of the 1 buildings wanted \(hanson\): it holds allensville"):
        TaskonomySource(tmp_path / "other", 12, DEPTH_AND_SCENE, split=Split("tiny", "train", parts))
    write_view(tmp_path / "one", "one building", 1, 0)
    with pytest.raises(UserError, match="files of no named building"):
        TaskonomySource(tmp_path / "one", 12, DEPTH_AND_SCENE, split=Split("tiny", "train", parts))


def test_selected_classes_are_a_choice(tmp_path: Path) -> None:
    write_view(tmp_path, "buildings", 1, 0)
    full, selected = (
        TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE, classes=classes) for classes in ("all", "selected")
    )
    assert np.count_nonzero(full[0].labels["class_scene"]) == 365
    assert np.count_nonzero(selected[0].labels["class_scene"]) == 63
    np.testing.assert_allclose(selected[0].labels["class_scene"].sum(), 1.0, rtol=1e-6)
    assert (full.facts, selected.facts) == ((), ("class_scene: 63 of 365 classes",))
    assert full.name != selected.name


def test_views_are_joined_by_number_not_by_order(tmp_path: Path) -> None:
    for view in range(4):
        write_view(tmp_path, "buildings", 1, view)
    (tmp_path / "depth_zbuffer/allensville/point_1_view_1_domain_depth_zbuffer.png").unlink()
    (tmp_path / "class_scene/allensville/point_1_view_2_domain_class_places.npy").unlink()
    source = TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE)
    assert [set(source[index].labels) for index in range(4)] == [
        {"depth_zbuffer", "class_scene"}, {"class_scene"}, {"depth_zbuffer"}, {"depth_zbuffer", "class_scene"},
    ]  # fmt: skip
    assert source[1].mask_valid is None


def damage_bits(root: Path) -> None:
    write(root / "depth_zbuffer/allensville/point_1_view_0_domain_depth_zbuffer.png", np.zeros((12, 12), np.uint8))


def damage_empty(root: Path) -> None:
    (root / "depth_zbuffer/allensville/point_1_view_0_domain_depth_zbuffer.png").write_bytes(b"")


def damage_cut(root: Path) -> None:
    path = root / "depth_zbuffer/allensville/point_1_view_0_domain_depth_zbuffer.png"
    path.write_bytes(path.read_bytes()[:150])


def damage_aspect(root: Path) -> None:
    write(root / "depth_zbuffer/allensville/point_1_view_0_domain_depth_zbuffer.png", np.zeros((12, 20), np.uint16))


def damage_vector(root: Path) -> None:
    write(root / "class_scene/allensville/point_1_view_0_domain_class_places.npy", np.ones(63, np.float32))


def damage_probabilities(root: Path) -> None:
    write(root / "class_scene/allensville/point_1_view_0_domain_class_places.npy", np.zeros(365, np.float32))


def damage_not_finite(root: Path) -> None:
    write(root / "class_scene/allensville/point_1_view_0_domain_class_places.npy", np.full(365, np.nan, np.float32))


def damage_format(root: Path) -> None:
    path = root / "depth_zbuffer/allensville/point_1_view_0_domain_depth_zbuffer.png"
    Image.open(path).save(path.with_suffix(".TIF"))
    path.unlink()


def damage_mask_twice(root: Path) -> None:
    for place in ("mask_valid/allensville", "allensville_mask_valid/mask_valid"):
        write(root / place / "point_1_view_0_domain_depth_zbuffer.png", np.full((12, 12), 255, np.uint8))


def damage_twice(root: Path) -> None:
    write(root / "allensville_depth_zbuffer/depth_zbuffer/point_1_view_0_domain_depth_zbuffer.png", depth())


@pytest.mark.parametrize(
    ("damage", "task", "reason", "kept"),
    [
        (damage_bits, "depth_zbuffer", "uint8", {"class_scene"}),
        (damage_empty, "depth_zbuffer", "empty", {"class_scene"}),
        (damage_cut, "depth_zbuffer", "damaged", {"class_scene"}),
        (damage_aspect, "depth_zbuffer", "no scaling", {"class_scene"}),
        (damage_vector, "class_scene", "365 floats", {"depth_zbuffer"}),
        (damage_probabilities, "class_scene", "no probabilities", {"depth_zbuffer"}),
        (damage_not_finite, "class_scene", "not finite", {"depth_zbuffer"}),
        (damage_format, "depth_zbuffer", "format 'tif'", {"class_scene"}),
        (damage_twice, "depth_zbuffer", "given twice", {"class_scene", "depth_zbuffer"}),
        (damage_mask_twice, "mask_valid", "given twice", {"class_scene", "depth_zbuffer"}),
    ],
)
def test_what_is_damaged_is_named_and_the_rest_kept(
    tmp_path: Path, damage: Any, task: str, reason: str, kept: set[str]
) -> None:
    write_view(tmp_path, "buildings", 1, 0)
    damage(tmp_path)
    with pytest.raises(PartialSample, match=reason) as caught:
        TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE)[0]
    (problem,) = caught.value.problems
    assert (problem.key, problem.task) == ("allensville/point_1_view_0", task)
    assert "point_1_view_0" in problem.path
    assert caught.value.sample is not None
    assert set(caught.value.sample.labels) == kept


def test_a_view_without_a_usable_image_is_lost_as_a_whole(tmp_path: Path) -> None:
    write_view(tmp_path, "buildings", 1, 0)
    write_view(tmp_path, "buildings", 1, 1)
    (tmp_path / "rgb/allensville/point_1_view_0_domain_rgb.png").unlink()
    (tmp_path / "rgb/allensville/point_1_view_1_domain_rgb.png").write_bytes(b"not an image")
    source = TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE)
    for index, reason in ((0, "no rgb image"), (1, "damaged .*not a PNG")):
        with pytest.raises(PartialSample, match=reason) as caught:
            source[index]
        assert caught.value.sample is None


def test_mask_valid_comes_from_its_own_domain_before_any_depth(tmp_path: Path) -> None:
    write_view(tmp_path, "buildings", 1, 0)
    mask = np.zeros((12, 12), np.uint8)
    mask[:, 6:] = 255
    write(tmp_path / "mask_valid/allensville/point_1_view_0_domain_depth_zbuffer.png", mask)
    sample = TaskonomySource(tmp_path, 6, DEPTH_AND_SCENE)[0]
    assert sample.mask_valid is not None
    np.testing.assert_array_equal(sample.mask_valid, np.repeat([[0, 0, 0, 255, 255, 255]], 6, axis=0))


def test_labels_that_are_unknown_everywhere_are_none(tmp_path: Path) -> None:
    write_view(tmp_path, "buildings", 1, 0)
    nothing = np.full((12, 12), 65535, np.uint16)
    write(tmp_path / "depth_zbuffer/allensville/point_1_view_0_domain_depth_zbuffer.png", nothing)
    write(tmp_path / "normal/allensville/point_1_view_0_domain_normal.png", rgb())
    report = pack(TaskonomySource(tmp_path, 12, ALL), tmp_path / "out")
    assert (report.samples, report.problems) == (1, ())
    assert ShardIndex.load(tmp_path / "out").tasks == ("class_scene",)
    write(tmp_path / "depth_euclidean/allensville/point_1_view_0_domain_depth_euclidean.png", depth())
    sample = TaskonomySource(tmp_path, 12, ALL)[0]
    assert set(sample.labels) == {"class_scene", "depth_euclidean", "normal"}
    assert sample.mask_valid is not None
    np.testing.assert_array_equal(sample.mask_valid == 0, depth() == 65535)


def test_a_mask_of_another_shape_than_the_image_is_never_laid_over_it(tmp_path: Path) -> None:
    write_view(tmp_path, "buildings", 1, 0)
    damage_aspect(tmp_path)
    write(tmp_path / "mask_valid/allensville/point_1_view_0_domain_depth_zbuffer.png", np.zeros((20, 12), np.uint8))
    with pytest.raises(PartialSample) as caught:
        TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE)[0]
    assert [problem.task for problem in caught.value.problems] == ["mask_valid", "depth_zbuffer"]
    assert caught.value.sample is not None
    assert caught.value.sample.mask_valid is None


def test_wide_views_lose_their_sides_and_unknown_pixels_do_not_bleed(tmp_path: Path) -> None:
    codes = np.full((8, 16), 1000, np.uint16)
    keypoints = np.full((8, 16), 2000, np.uint16)
    codes[:, :7] = 65535
    keypoints[:, :7] = 60000
    codes[:, 12:] = 7
    write(tmp_path / "rgb/b/point_0_view_0_domain_rgb.png", np.zeros((8, 16, 3), np.uint8))
    write(tmp_path / "depth_zbuffer/b/point_0_view_0_domain_depth_zbuffer.png", codes)
    write(tmp_path / "keypoints3d/b/point_0_view_0_domain_keypoints3d.png", keypoints)
    sample = TaskonomySource(tmp_path, 4, resolve_tasks(["depth_zbuffer", "keypoints3d"]))[0]
    assert sample.mask_valid is not None
    known = sample.mask_valid == 255
    assert set(np.unique(sample.labels["depth_zbuffer"])) == {1000, 65535}
    np.testing.assert_array_equal(sample.labels["depth_zbuffer"] == 65535, ~known)
    assert (sample.labels["keypoints3d"][known] == 2000).all()


def test_a_folder_of_something_else_says_what_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "photos" / "cat.png", rgb())
    with pytest.raises(UserError, match=r"no known domain.*depth_zbuffer.*it holds photos"):
        TaskonomySource(tmp_path, 12, ALL)
    write(tmp_path / "normal/b/point_0_view_0_domain_normal.png", rgb())
    with pytest.raises(UserError, match="no rgb"):
        TaskonomySource(tmp_path, 12, ALL)
    with pytest.raises(UserError, match="no folder"):
        TaskonomySource(tmp_path / "nowhere", 12, ALL)
    with pytest.raises(UserError, match=r"'semseg' is not of Taskonomy"):
        TaskonomySource(tmp_path, 12, resolve_tasks(["semseg"]))


def test_files_that_belong_to_no_view_are_listed(tmp_path: Path) -> None:
    write_view(tmp_path / "raw", "buildings", 1, 0)
    stray = write(tmp_path / "raw/rgb/allensville/view_7.png", rgb())
    (stray.parent / ".DS_Store").touch()
    write(tmp_path / "raw/photos/cat.png", rgb())
    report = pack(TaskonomySource(tmp_path / "raw", 12, DEPTH_AND_SCENE), tmp_path / "out")
    assert report.samples == 1
    (problem,) = report.problems
    assert (problem.key, problem.path) == ("view_7.png", str(stray))
    assert "belongs to no view" in problem.reason


def test_a_folder_that_cannot_be_read_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_view(tmp_path, "buildings", 1, 0)
    scandir = os.scandir

    def forbidden(path: str) -> Any:
        if path == str(tmp_path / "depth_zbuffer"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)  # Root may read everything, so no mode would do.
    with pytest.raises(UserError, match=r"folder .*depth_zbuffer cannot be read \(Permission denied\)"):
        TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE)


def test_buildings_whose_keys_would_collide_are_refused_before_any_work(tmp_path: Path) -> None:
    for building in ("a.b", "a-b"):
        write(tmp_path / f"rgb/{building}/point_0_view_0_domain_rgb.png", rgb())
    with pytest.raises(UserError, match=r"'a-b' and 'a.b' would share the sample key a-b/point_0_view_0"):
        TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE)


def test_the_name_follows_the_content(tmp_path: Path) -> None:
    write_view(tmp_path, "buildings", 1, 0)
    before = TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE).name
    assert TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE).name == before
    assert before.startswith("taskonomy-12px-2tasks-")
    assert TaskonomySource(tmp_path, 13, DEPTH_AND_SCENE).name != before
    write_view(tmp_path, "buildings", 1, 1)
    assert TaskonomySource(tmp_path, 12, DEPTH_AND_SCENE).name != before


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    if not REAL.is_dir():
        pytest.skip(f"the official sample files are not at {REAL}")
    out = tmp_path_factory.mktemp("real")
    report = pack(TaskonomySource(REAL, 128, ALL), out)
    (problem,) = report.problems
    assert (problem.key, problem.task) == ("hypersim/scene_0/point_85_view_0", "depth_zbuffer")
    assert "uint8" in problem.reason
    return ShardIndex.load(out)


def test_real_files_become_samples_with_partial_labels(real: ShardIndex) -> None:
    assert real.keys == ("hypersim/scene_0/point_85_view_0", "replica/apartment_0/point_47_view_25")
    available = dict(zip(real.keys, real.available([spec.name for spec in ALL]).tolist(), strict=True))
    dense = {spec.name for spec in ALL if spec.dense}
    for key, missing in zip(real.keys, ({"depth_zbuffer", "principal_curvature"}, {"depth_euclidean"}), strict=True):
        has = {spec.name for spec, here in zip(ALL, available[key], strict=True) if here}
        assert has == dense - missing


def test_real_codes_are_intact(real: ShardIndex) -> None:
    for sample, task in ((0, "depth_euclidean"), (1, "depth_zbuffer"), (0, "segment_unsup25d"), (1, "normal")):
        point, view = real.meta(sample)["point"], real.meta(sample)["view"]
        (path,) = REAL.glob(f"{task}/{real.meta(sample)['building']}/point_{point}_view_{view}_domain_{task}.png")
        original = np.asarray(Image.open(path))
        label = real.label(sample, TASKS[task])
        assert label.dtype == original.dtype
        assert np.isin(one_number_per_pixel(label), one_number_per_pixel(original)).all()


def one_number_per_pixel(codes: NDArray[Any]) -> NDArray[np.int64]:
    channels = codes.reshape(*codes.shape[:2], -1).astype(np.int64)
    return np.asarray(channels @ 65536 ** np.arange(channels.shape[2]))


def test_real_masks_follow_the_depth(real: ShardIndex) -> None:
    zbuffer = real.label(1, TASKS["depth_zbuffer"])
    np.testing.assert_array_equal(real.mask_valid(1), zbuffer != 65535)
    euclidean = real.label(0, TASKS["depth_euclidean"])
    np.testing.assert_array_equal(real.mask_valid(0), euclidean != 65535)
