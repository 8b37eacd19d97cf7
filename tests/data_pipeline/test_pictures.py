"""Pictures: every task draws, colours mean what they should, unknown pixels stand out."""

from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from configs.tasks import TASKS, get_task
from data_pipeline.pictures import class_palette, colour_range, to_picture
from data_pipeline.targets import to_target


def luminance(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.asarray(picture @ np.array([0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_draws_a_target_and_a_raw_prediction(name: str) -> None:
    spec = get_task(name)
    shape = (spec.channels, 24, 24) if spec.dense else (spec.channels,)
    prediction = to_picture(spec, 5 * torch.randn(shape, dtype=torch.bfloat16))
    target = torch.zeros(24, 24, dtype=torch.int64) if spec.target == "class_ids" else torch.rand(shape)
    for picture in (prediction, to_picture(spec, target)):
        assert picture.dtype == np.uint8
        assert picture.shape == ((24, 24, 3) if spec.dense else (128, 128, 3))


def test_unknown_pixels_are_grey_and_hatched() -> None:
    values = torch.rand(1, 32, 32)
    mask = torch.ones(1, 32, 32, dtype=torch.bool)
    mask[:, :, 16:] = False
    picture = to_picture(get_task("keypoints2d"), values, mask)
    np.testing.assert_array_equal(picture[:, :16], to_picture(get_task("keypoints2d"), values)[:, :16])
    unknown = picture[:, 16:].reshape(-1, 3)
    assert (unknown == unknown[:, :1]).all()
    assert len(np.unique(unknown)) == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", TASKS)
def test_what_is_not_finite_is_hatched(name: str, value: float) -> None:
    spec = get_task(name)
    torch.manual_seed(0)
    values = torch.randn((spec.channels, 24, 24) if spec.dense else (spec.channels,))
    good = to_picture(spec, values, value_range=(-3.0, 3.0))
    values.view(-1)[-1] = value
    broken = to_picture(spec, values, value_range=(-3.0, 3.0))
    corner = broken[-1, -1]
    assert (corner == corner[0]).all()
    assert 140 < corner[0] < 200
    if spec.dense:
        np.testing.assert_array_equal(broken[:-1], good[:-1])
    assert to_picture(spec, torch.full_like(values, value)).shape == good.shape


def test_depths_of_one_range_have_equal_colours_and_near_is_bright() -> None:
    spec = get_task("depth_zbuffer")
    near_to_far = torch.linspace(0.4, 0.8, 64).reshape(1, 1, 64).expand(1, 4, 64)
    nearer = near_to_far[:, :, :32]
    both = colour_range(spec, [(near_to_far, None), (nearer, None)])
    assert both is not None
    assert both == pytest.approx((0.4, 0.8), abs=0.02)
    picture = to_picture(spec, near_to_far, value_range=both)
    np.testing.assert_array_equal(picture[:, :32], to_picture(spec, nearer, value_range=both))
    assert (np.diff(luminance(picture)[0]) <= 0.5).all()
    assert luminance(picture)[0, 0] - luminance(picture)[0, -1] > 100


@pytest.mark.parametrize("task", ["depth_zbuffer", "keypoints2d"])
def test_a_colour_range_leaves_out_unknown_and_infinite_values(task: str) -> None:
    spec = get_task(task)
    values = torch.tensor([[[0.0, 1.0, 50.0, float("inf")]]])
    mask = torch.tensor([[[True, True, False, True]]])
    low, high = colour_range(spec, [(values, mask)]) or (0.0, 0.0)
    assert -1.0 <= low < 0.5 < high <= 1.0
    for nothing in ([(values, torch.zeros_like(mask))], []):
        low, high = colour_range(spec, nothing) or (0.0, 0.0)
        assert low < high


def test_faint_heat_maps_show_and_fixed_colours_stay() -> None:
    spec = get_task("keypoints2d")
    faint = torch.full((1, 16, 16), -1.0)
    faint[0, 3:6, 3:6] = -0.9
    picture = to_picture(spec, faint, value_range=colour_range(spec, [(faint, None)]))
    assert luminance(picture)[4, 4] > 200
    assert luminance(picture)[10, 10] < 20
    for task in ("normal", "principal_curvature", "segment_unsup2d", "semseg"):
        assert colour_range(get_task(task), [(faint, None)]) is None


def test_classes_by_logits_and_by_ids_look_the_same() -> None:
    spec = get_task("semseg")
    ids = torch.randint(0, 21, (9, 9))
    logits = torch.nn.functional.one_hot(ids, 21).permute(2, 0, 1).float()
    np.testing.assert_array_equal(to_picture(spec, ids), to_picture(spec, logits))
    np.testing.assert_array_equal(to_picture(spec, ids), to_picture(spec, ids[None]))
    # From the palette that is in every PNG of VOC 2012: aeroplane, person, tvmonitor.
    assert class_palette(spec)[[1, 15, 20]].tolist() == [[128, 0, 0], [192, 128, 128], [0, 64, 128]]


def test_parts_differ_in_brightness_or_hue() -> None:
    palette = class_palette(get_task("human_parts")).astype(int)
    assert min(np.abs(one - other).sum() for one, other in combinations(palette, 2)) > 60


def test_normals_are_drawn_by_direction_only() -> None:
    spec = get_task("normal")
    values = torch.randn(3, 8, 8)
    np.testing.assert_array_equal(to_picture(spec, values), to_picture(spec, 7 * values))
    facing = torch.tensor([0.0, 0.0, -1.0]).reshape(3, 1, 1)
    assert to_picture(spec, facing)[0, 0].tolist() == [128, 128, 0]


def test_flat_surfaces_are_white_and_curvature_has_two_colours() -> None:
    stored = torch.tensor([60, 127, 200], dtype=torch.uint8).reshape(1, 1, 1, 3).expand(1, 3, 1, 3)
    spec = get_task("principal_curvature")
    picture = to_picture(spec, to_target(spec, stored, torch.ones(1, 1, 3, dtype=torch.bool)).values[0])
    assert luminance(picture)[0, 1] > 240
    assert picture[0, 0, 0] > picture[0, 0, 2]
    assert picture[0, 2, 2] > picture[0, 2, 0]


def test_bars_name_the_likeliest_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = get_task("class_scene")
    logits = torch.zeros(365)
    logits[[7, 300]] = torch.tensor([9.0, 8.0])
    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def record(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, *args: object, **kwargs: object) -> None:
        texts.append(text)
        draw(self, xy, text, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    of_logits = to_picture(spec, logits)
    of_probabilities = to_picture(spec, logits.softmax(0))
    np.testing.assert_array_equal(of_logits, of_probabilities)
    assert texts[0].startswith("class 7 ")
    assert texts[1].startswith("class 300 ")
    assert Image.fromarray(of_logits).size == (128, 128)


def test_binary_logits_are_drawn_as_probabilities() -> None:
    spec = get_task("saliency")
    certain = to_picture(spec, torch.tensor([[[-40.0, 40.0]]]))
    np.testing.assert_array_equal(certain, to_picture(spec, torch.tensor([[[0.0, 1.0]]])))
