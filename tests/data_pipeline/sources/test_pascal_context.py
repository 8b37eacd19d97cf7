"""PASCAL_MT folders to samples: void rules, parts, splits; damage is listed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from configs.errors import UserError
from configs.tasks import HUMAN_PARTS, resolve_tasks
from data_pipeline.pack import pack
from data_pipeline.sample import Sample
from data_pipeline.source import PartialSample, Problem
from data_pipeline.sources.pascal_context import PascalContextSource
from tests.data_pipeline.pascal_tree import (
    FACING,
    FILES,
    HEIGHT,
    NAMES,
    SIZE,
    SKY,
    WALL,
    WIDTH,
    Boxes,
    annotate,
    box,
    classes,
    cut,
    half,
    ids,
    objects,
    source,
    two_images,
    write,
    write_image,
    write_split,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One image in the training split, and one in the other."""
    return two_images(tmp_path / "PASCAL_MT")


def problem_of(root: Path) -> tuple[Problem, Sample | None]:
    """The only problem of the first training image, and what remains of it."""
    with pytest.raises(PartialSample) as caught:
        source(root)[0]
    (problem,) = caught.value.problems
    assert "\n" not in str(caught.value)
    return problem, caught.value.sample


def test_an_image_with_all_labels(root: Path) -> None:
    sample = source(root)[0]
    assert (sample.key, set(sample.labels), sample.mask_valid) == ("2008_000008", NAMES, None)
    assert sample.meta == {"image": "2008_000008", "split": "train", "height": HEIGHT, "width": WIDTH}
    assert sample.rgb.shape == (SIZE, SIZE, 3)
    # The whole width: the ramp starts dark and ends bright.
    assert sample.rgb[:, 0].max() < 20
    assert sample.rgb[:, -1].min() > 235
    np.testing.assert_array_equal(sample.labels["semseg"], half(ids()))
    np.testing.assert_array_equal(sample.labels["saliency"], half(np.where(ids() == 15, 200, 50)))


def test_splits_are_the_official_lists(root: Path) -> None:
    write_split(root, "train", "2008_000008", "2010_001001")
    train, val = source(root), source(root, "val")
    assert [train[index].key for index in range(len(train))] == ["2008_000008", "2010_001001"]
    assert [val[index].key for index in range(len(val))] == ["2010_001001"]


def test_a_grey_segmentation_of_pascal_context_stands_in_for_a_missing_one_of_voc(root: Path) -> None:
    other = root / "semseg/pascal-context/2008_000008.png"
    write(other, np.full((HEIGHT, WIDTH), 7, np.uint8))
    np.testing.assert_array_equal(source(root)[0].labels["semseg"], half(ids()))
    (root / FILES["semseg"].format("2008_000008")).unlink()
    assert (source(root)[0].labels["semseg"] == 7).all()


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("head", "head hair mouth nose leye reye lear rear lebrow rebrow"),
        ("torso", "torso neck"),
        ("upper_arm", "luarm ruarm"),
        ("lower_arm", "llarm rlarm lhand rhand"),
        ("upper_leg", "luleg ruleg"),
        ("lower_leg", "llleg rlleg lfoot rfoot"),
    ],
)
def test_parts_of_people_by_name(root: Path, part: str, names: str) -> None:
    for name in names.split():
        annotate(root, "2008_000008", (15, {name: np.s_[4:8, 8:16]}))
        expected = box(*np.s_[4:8, 8:16]) * HUMAN_PARTS.index(part)
        np.testing.assert_array_equal(source(root)[0].labels["human_parts"], half(expected))


def test_several_people_share_a_label_with_other_objects_and_bare_people_as_background(root: Path) -> None:
    annotate(
        root,
        "2008_000008",
        (12, {"head": np.s_[0:4, 0:4]}),  # a dog's
        (15, {}),
        (15, {"head": np.s_[4:8, 8:16], "neck": np.s_[6:8, 8:16]}),
        (15, {"rhand": np.s_[6:12, 20:24]}),
    )
    expected = box(*np.s_[4:8, 8:16])
    expected[6:8, 8:16] = 2  # of parts that overlap the later one counts
    expected[6:12, 20:24] = 4
    np.testing.assert_array_equal(source(root)[0].labels["human_parts"], half(expected))


@pytest.mark.parametrize("things", [[], [(15, {})], [(12, {"head": np.s_[0:4, 0:4]})]])
def test_an_image_without_parts_of_people_is_void_and_has_no_such_label(
    root: Path, things: list[tuple[int, Boxes]]
) -> None:
    annotate(root, "2008_000008", *things)
    assert set(source(root)[0].labels) == NAMES - {"human_parts"}


def test_void_everywhere_is_no_label(root: Path) -> None:
    write(root / FILES["semseg"].format("2008_000008"), np.full((HEIGHT, WIDTH), 255, np.uint8))
    write(root / FILES["edges"].format("2008_000008"), {"LabelMap": np.full((HEIGHT, WIDTH), SKY, np.uint16)})
    assert set(source(root)[0].labels) == NAMES - {"semseg", "normals"}


def test_normals_are_known_where_the_class_says_so(root: Path) -> None:
    normals = source(root)[0].labels["normals"]
    void = half(classes()) == SKY
    np.testing.assert_array_equal((normals == 255).all(2), void)
    assert (normals[~void] == FACING).all()


def test_normals_of_void_pixels_do_not_bleed_and_all_are_of_length_one(root: Path) -> None:
    codes = np.zeros((HEIGHT, WIDTH, 3), np.uint8)  # nonsense in the sky
    codes[12:, 0::2] = (128, 128, 255)
    codes[12:, 1::2] = (255, 128, 128)
    codes[20:] = 255  # no normal, whatever the class
    write(root / FILES["normals"].format("2008_000008"), codes)
    label_map = np.where(np.arange(HEIGHT)[:, None] < 12, SKY, WALL) * np.ones((1, WIDTH))
    write(root / FILES["edges"].format("2008_000008"), {"LabelMap": label_map})
    # At half the width an output pixel weighs its own two columns equally.
    normals = source(root)[0].labels["normals"].astype(float)
    assert (normals[[*range(8), 13, 14, 15]] == 255).all()
    vectors = normals[8:13] / 127.5 - 1
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=2), 1, atol=0.01)
    np.testing.assert_allclose(vectors[:, 4:-4], np.full((5, 8, 3), (0.7071, 0.004, 0.7071)), atol=0.01)


def test_normals_against_each_other_have_no_direction(root: Path) -> None:
    codes = np.full((HEIGHT, WIDTH, 3), (0, 128, 128), np.uint8)
    codes[:, 0::2] = 255 - codes[:, 0::2]
    write(root / FILES["normals"].format("2008_000008"), codes)
    write(root / FILES["edges"].format("2008_000008"), {"LabelMap": np.full((HEIGHT, WIDTH), WALL, np.uint16)})
    normals = source(root)[0].labels["normals"]
    assert (normals[:, 2:-2] == 255).all()


@pytest.mark.parametrize("size", [16, 24, 100])
def test_edges_are_closed_lines_one_pixel_wide_at_any_size(root: Path, size: int) -> None:
    label_map = np.full((HEIGHT, WIDTH), SKY, np.uint16)
    label_map[:, 13:] = WALL
    write(root / FILES["edges"].format("2008_000008"), {"LabelMap": label_map})
    edges = source(root, size=size)[0].labels["edges"]
    np.testing.assert_array_equal((edges == 255).sum(1), 1)
    assert set(np.unique(edges)) == {0, 255}
    assert abs(np.argmax(edges[0]) + 1 - 13 / WIDTH * size) <= 1


def test_a_label_without_a_file_is_missing_and_no_problem(root: Path) -> None:
    for task in ("human_parts", "saliency"):
        (root / FILES[task].format("2008_000008")).unlink()
    assert set(source(root)[0].labels) == NAMES - {"human_parts", "saliency"}


def test_a_whole_folder_may_be_missing_but_not_all(root: Path) -> None:
    for task in ("saliency", "normals"):
        for path in (root / FILES[task]).parent.iterdir():
            path.unlink()
        (root / FILES[task]).parent.rmdir()
    assert set(source(root)[0].labels) == NAMES - {"saliency", "normals"}
    with pytest.raises(UserError, match=r"no label for split 'train': looked for sal_distill/\*\.png"):
        PascalContextSource(root, "train", SIZE, resolve_tasks(["saliency"]))


def replace_with(content: NDArray[Any] | Mapping[str, Any]) -> Callable[[Path], object]:
    return lambda path: write(path, content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_format(path: Path) -> None:
    path.rename(path.with_suffix(".bmp"))


def unknown_part(path: Path) -> None:
    annotate(path.parents[1], path.stem, (15, {"tail": np.s_[0:4, 0:4]}))


def small_part(path: Path) -> None:
    things = objects((15, {"head": np.s_[0:4, 0:4]}))
    things[0, 0]["parts"][0, 0]["mask"] = np.ones((3, 4), np.uint8)
    write(path, {"anno": {"imname": path.stem, "objects": things}})


WIDE = np.zeros((WIDTH, HEIGHT), np.uint8)


@pytest.mark.parametrize(
    ("task", "damage", "reason"),
    [
        ("semseg", cut, "damaged"),
        ("semseg", empty, "empty"),
        ("semseg", other_format, "format 'bmp', but must be png"),
        ("semseg", replace_with(WIDE), r"shape \(32, 24\), the image \(24, 32\)"),
        ("semseg", replace_with(np.full((HEIGHT, WIDTH), 21, np.uint8)), "holds 21, which is no class"),
        ("semseg", replace_with(np.zeros((HEIGHT, WIDTH, 3), np.uint8)), "mode RGB"),
        ("saliency", replace_with(np.zeros((HEIGHT, WIDTH), np.uint16)), "mode I;16"),
        ("saliency", replace_with(WIDE), "shape"),
        ("saliency", cut, "damaged"),
        ("human_parts", cut, "damaged"),
        ("human_parts", empty, "empty"),
        ("human_parts", lambda path: path.write_bytes(b"not MATLAB" * 50), "not one of MATLAB 5 to 7"),
        ("human_parts", replace_with({"other": 1}), "no 'anno'"),
        ("human_parts", replace_with({"anno": np.zeros((1, 1))}), "does not hold objects"),
        ("human_parts", unknown_part, "part 'tail', but known are head"),
        ("human_parts", small_part, r"shape \(3, 4\)"),
        ("normals", replace_with(ids()), "uint8 of shape"),
        ("normals", replace_with(np.zeros((WIDTH, HEIGHT, 3), np.uint8)), "shape"),
        ("normals", cut, "damaged"),
    ],
)
def test_what_is_damaged_is_named_and_the_rest_kept(
    root: Path, task: str, damage: Callable[[Path], object], reason: str
) -> None:
    damage(root / FILES[task].format("2008_000008"))
    with pytest.raises(PartialSample, match=reason):
        source(root)[0]
    problem, sample = problem_of(root)
    assert (problem.key, problem.task) == ("2008_000008", task)
    assert "2008_000008" in problem.path
    assert sample is not None
    assert set(sample.labels) == NAMES - {task}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "not one of MATLAB 5 to 7"),
        (replace_with({"LabelMap": WIDE}), "shape"),
        (replace_with({"LabelMap": np.full((HEIGHT, WIDTH), 460)}), "no class"),
        (replace_with({"LabelMap": np.full((HEIGHT, WIDTH), 1.5)}), "no class"),
        (replace_with({"LabelMap": "wall"}), "must be numbers"),
        (replace_with({"other": 1}), "no 'LabelMap'"),
    ],
)
def test_without_a_usable_label_map_there_are_neither_edges_nor_normals(
    root: Path, damage: Callable[[Path], object], reason: str
) -> None:
    path = root / FILES["edges"].format("2008_000008")
    damage(path)
    with pytest.raises(PartialSample) as caught:
        source(root)[0]
    problems = {problem.task: problem for problem in caught.value.problems}
    assert set(problems) == {"normals", "edges"}
    assert all(reason in problem.reason for problem in problems.values())
    assert str(path) in problems["normals"].reason
    assert caught.value.sample is not None
    assert set(caught.value.sample.labels) == NAMES - {"normals", "edges"}


def test_normals_without_any_label_map_are_a_problem(root: Path) -> None:
    (root / FILES["edges"].format("2008_000008")).unlink()
    problem, sample = problem_of(root)
    assert problem.task == "normals"
    assert "not known without its file in pascal-context/trainval" in problem.reason
    assert sample is not None
    assert set(sample.labels) == NAMES - {"normals", "edges"}


def test_an_image_that_is_missing_or_damaged_is_lost_as_a_whole(root: Path) -> None:
    cut(root / FILES["rgb"].format("2008_000008"))
    write_split(root, "train", "2010_001001", "2008_000008", "2007_000001", "../2010_001001")
    images = source(root)
    for index, reason in ((1, "damaged"), (2, "no image of it"), (3, "no image of it")):
        with pytest.raises(PartialSample, match=reason) as caught:
            images[index]
        assert caught.value.sample is None


def test_what_is_given_twice_is_listed(root: Path) -> None:
    write_split(root, "train", "2008_000008", "2010_001001", "2008_000008")
    write(root / "sal_distill/2008_000008.webp", np.zeros((HEIGHT, WIDTH), np.uint8))
    report = pack(source(root), root.parent / "out")
    assert report.samples == 2
    used = root / FILES["saliency"].format("2008_000008")
    assert [(problem.key, problem.task, problem.reason) for problem in report.problems] == [
        ("2008_000008", "saliency", f"given twice; used is {used}"),
        ("2008_000008", "", "the split's list names it twice; it is used once"),
    ]


def test_names_that_a_key_cannot_hold(root: Path) -> None:
    write_image(root, "späte Straße")
    write_split(root, "train", "2008_000008", "späte Straße")
    sample = source(root)[1]
    assert (sample.key, sample.meta["image"], set(sample.labels)) == ("sp-te-Stra-e", "späte Straße", NAMES)
    write_split(root, "train", "2008_000008", "späte Straße", "spöte Straße")
    with pytest.raises(UserError, match="'späte Straße' and 'spöte Straße' would share the sample key sp-te-Stra-e"):
        source(root)


def test_lists_with_other_line_ends_and_marks(root: Path) -> None:
    (root / "ImageSets/Context/train.txt").write_bytes("\ufeff2008_000008\r\n\r\n2010_001001 \r\n".encode())
    assert [source(root)[index].key for index in range(2)] == ["2008_000008", "2010_001001"]


def test_a_folder_of_something_else_says_what_is_wrong(root: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        source(root / "nowhere")
    with pytest.raises(UserError, match="'normal' is not of PASCAL-Context"):
        PascalContextSource(root, "train", SIZE, resolve_tasks(["normal"]))
    with pytest.raises(UserError, match="size 0"):
        source(root, size=0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\xfa", "not UTF-8"),
        (b"\n\n", "names no image"),
        (b"2007_000001", "holds none of the 1 images of split 'val'"),
    ],
)
def test_a_list_that_is_of_no_use(root: Path, content: bytes | None, reason: str) -> None:
    path = root / "ImageSets/Context/val.txt"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        source(root, "val")


def test_the_name_follows_the_content(root: Path) -> None:
    before = source(root).name
    assert source(root).name == before
    assert before.startswith("pascal-context-train-16px-5tasks-")
    assert len({before, source(root, "val").name, source(root, size=17).name}) == 3
    (root / FILES["saliency"].format("2008_000008")).unlink()
    assert source(root).name != before
