"""Windows that turn, zoom and reach beyond the image: everything moves together, and what is unknown stays unknown."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from configs.augmentation import AugmentConfig
from configs.tasks import TASKS, resolve_tasks
from data_pipeline.batch import Batch
from data_pipeline.draws import Augment, draw_augmentations
from data_pipeline.targets import prepare_batch, to_target
from data_pipeline.transforms import apply_geometry
from tests.data_pipeline.test_transforms import ALL, FULL, make_batch

DENSE = tuple(spec for spec in ALL if spec.dense)


def turned(batch: Batch, degrees: float, crop: tuple[float, float, float, float] = FULL, flip: bool = False) -> Batch:
    count = len(batch.images)
    return replace(
        batch,
        crop=torch.tensor([crop]).repeat(count, 1),
        flip=torch.full((count,), flip),
        rotation=torch.full((count,), math.radians(degrees)),
    )


def source_of(batch: Batch, row: int, stored: int, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where image `row` must be read: (size, size) rows and columns in source pixels, by homogeneous matrices."""

    def move(x: float, y: float) -> NDArray[np.float64]:
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])

    top, left, height, width = (float(value) for value in batch.crop[row].double())
    assert batch.rotation is not None
    angle = float(batch.rotation[row])
    # From the source to the output, y down: window's centre to the origin, anticlockwise as seen, mirror, scale.
    turn = np.array([[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    mirror = np.diag([-1.0 if batch.flip[row] else 1.0, 1, 1])
    scale = np.diag([size / (width * stored), size / (height * stored), 1])
    centre = ((left + width / 2) * stored, (top + height / 2) * stored)
    forward = move(size / 2, size / 2) @ scale @ mirror @ turn @ move(-centre[0], -centre[1])
    output = np.stack([*np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5), np.ones((size, size))])
    x, y, _ = np.einsum("ij,jrc->irc", np.linalg.inv(forward), output)
    return y, x


windows = st.tuples(
    st.floats(0.25, 1.75, width=32),
    st.floats(0.25, 1.75, width=32),
    st.floats(0, 1, width=32),
    st.floats(0, 1, width=32),
).map(lambda t: (t[2] * (1 - t[0]), t[3] * (1 - t[1]), t[0], t[1]))
angles = st.floats(-180, 180, width=32)


@settings(max_examples=60, deadline=None)
@given(crop=windows, degrees=angles, flip=st.booleans(), side=st.integers(4, 30), size=st.integers(1, 30))
def test_every_pixel_is_read_where_geometry_says(
    crop: tuple[float, float, float, float], degrees: float, flip: bool, side: int, size: int
) -> None:
    tasks = resolve_tasks(["depth_zbuffer", "segment_unsup2d"])
    batch = turned(make_batch(tasks, 1, side), degrees, crop, flip)
    batch.labels["depth_zbuffer"] = torch.arange(side * side).view(1, 1, side, side).to(torch.int32).to(torch.uint16)
    result = apply_geometry(batch, tasks, size)
    rows, columns = source_of(batch, 0, side, size)
    sure = np.minimum(np.abs(rows - rows.round()), np.abs(columns - columns.round())) > 1e-4
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    assert result.inside is not None
    assert (result.inside[0].numpy() == inside)[sure].all()
    expected = (np.floor(rows) * side + np.floor(columns)).astype(int)
    assert (result.labels["depth_zbuffer"][0, 0].numpy() == expected)[sure & inside].all()
    assert not result.mask_valid[0].numpy()[sure & ~inside].any()


@settings(max_examples=60, deadline=None)
@given(crop=windows, degrees=angles, flip=st.booleans(), side=st.integers(8, 30), size=st.integers(2, 40))
def test_images_and_labels_stay_aligned(
    crop: tuple[float, float, float, float], degrees: float, flip: bool, side: int, size: int
) -> None:
    """Pixels tell their column and row: images and averaged labels the mean, others that of the nearest pixel."""
    tasks = resolve_tasks(["edge_texture", "principal_curvature"])
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy")) * 8
    batch = turned(make_batch(tasks, 1, side), degrees, crop, flip)
    codes = torch.cat([place, torch.zeros_like(place[:1])])[None]
    batch = replace(batch, images=codes.to(torch.uint8))
    batch.labels["principal_curvature"] = codes.to(torch.uint8)
    batch.labels["edge_texture"] = (place[:1, None] * 256).to(torch.int32).to(torch.uint16)
    result = apply_geometry(batch, tasks, size)
    assert result.inside is not None
    inside = result.inside[0]
    image = result.images[0].float()
    assert ((result.labels["edge_texture"][0, 0] / 256 - image[0]).abs() <= 0.51)[inside].all()
    # Away from the border a mean is that of the place itself, half a pixel of 8 codes from the nearest pixel at most.
    rows, columns = source_of(batch, 0, side, size)
    reach = max(1.0, max(crop[2:]) * side / size * 1.5) + 1.0
    well_inside = torch.from_numpy((np.minimum(rows, columns) > reach) & (np.maximum(rows, columns) < side - reach))
    nearest = result.labels["principal_curvature"][0].float()
    assert ((image[:2] - nearest[:2]).abs() <= 4.6)[:, well_inside].all()


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_anticlockwise_and_exact(quarters: int) -> None:
    tasks = resolve_tasks(["segment_unsup2d", "depth_zbuffer"])
    batch = make_batch(tasks, 2, 12)
    result = apply_geometry(turned(batch, 90 * quarters), tasks, 12)
    assert torch.equal(result.images, torch.rot90(batch.images, quarters, (2, 3)))
    for spec in tasks:
        expected = torch.rot90(batch.labels[spec.name].to(torch.int64), quarters, (2, 3))
        assert torch.equal(result.labels[spec.name].to(torch.int64), expected)
    assert result.inside is not None
    assert result.inside.all()


def test_a_turn_of_nothing_is_the_window_along_the_axes() -> None:
    tasks = resolve_tasks(["depth_zbuffer", "keypoints3d", "reshading", "semseg", "normal"])
    crop = (0.1, 0.2, 0.7, 0.6)
    batch = make_batch(tasks, 2, 20)
    straight = apply_geometry(replace(batch, crop=torch.tensor([crop]).repeat(2, 1)), tasks, 17)
    zero = apply_geometry(turned(batch, 0.0, crop), tasks, 17)
    assert (straight.images.int() - zero.images.int()).abs().max() <= 1
    assert torch.equal(straight.mask_valid, zero.mask_valid)
    for spec in tasks:
        known = straight.mask_valid.unsqueeze(1) if spec.uses_mask_valid else torch.ones(1, dtype=torch.bool)
        error = (straight.labels[spec.name].double() - zero.labels[spec.name].double()).abs() * known
        assert error.max() <= (1 if spec.interpolation == "bilinear" else 1e-4)


@pytest.mark.parametrize("name", ["normal", "normals"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("degrees", [-170.0, -20.0, 7.0, 60.0, 90.0])
def test_normals_of_a_turned_ball_are_those_of_a_ball(name: str, flip: bool, degrees: float) -> None:
    side = 96
    offset = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    ball = x.square() + y.square() < 0.7
    normals = torch.stack([x, y, -(1 - x.square() - y.square()).clamp(min=0).sqrt()])
    spec = TASKS[name]
    batch = turned(make_batch((spec,), 1, side), degrees, flip=flip)
    batch.labels[name] = ((normals + 1) * 127.5).round()[None].to(torch.uint8)
    moved = apply_geometry(batch, (spec,), side)
    target = to_target(spec, moved.labels[name], torch.ones(1, side, side, dtype=torch.bool))
    error = torch.rad2deg((target.values[0] * normals).sum(0).clamp(-1, 1).acos())
    assert error[ball].max() < 3.0


def test_a_direction_to_the_right_turns_upwards() -> None:
    tasks = resolve_tasks(["normal"])
    batch = turned(make_batch(tasks, 1, 4), 90)
    batch.labels["normal"] = torch.tensor([255, 128, 20], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 4, 4)
    result = apply_geometry(batch, tasks, 4).labels["normal"]
    assert result[0, :, 0, 0].tolist() == pytest.approx([128, 0, 20], abs=0.01)


def test_unknown_directions_stay_unknown() -> None:
    spec = TASKS["normals"]
    batch = turned(make_batch((spec,), 1, 16), 33)
    unknown = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    batch.labels["normals"] = torch.where(unknown, 255, batch.labels["normals"].clamp(max=254))
    batch = replace(batch, mask_valid=~unknown[None])
    result = apply_geometry(batch, (spec,), 16)
    target = to_target(spec, result.labels["normals"], result.mask_valid, result.inside)
    assert torch.equal(target.mask[0, 0], result.mask_valid[0])


@settings(max_examples=40, deadline=None)
@given(crop=windows, degrees=angles, side=st.integers(3, 24), size=st.integers(1, 24), seed=st.integers(0, 9))
def test_nothing_unknown_leaks_into_averages_and_ids_are_never_mixed(
    crop: tuple[float, float, float, float], degrees: float, side: int, size: int, seed: int
) -> None:
    tasks = tuple(spec for spec in DENSE if not spec.oriented)
    batch = turned(make_batch(tasks, 1, side, seed), degrees, crop)
    known = batch.mask_valid.unsqueeze(1)
    batch.labels["keypoints3d"] = torch.where(known, 1000, 60000).to(torch.int32).to(torch.uint16)
    result = apply_geometry(batch, tasks, size)
    assert (result.labels["keypoints3d"][result.mask_valid.unsqueeze(1)] == 1000).all()
    for spec in tasks:
        if spec.interpolation == "nearest":
            stored = set(batch.labels[spec.name].numpy().ravel().tolist())
            assert set(result.labels[spec.name].numpy().ravel().tolist()) <= stored


@settings(max_examples=20, deadline=None)
@given(crop=windows, degrees=angles, side=st.integers(2, 20), size=st.integers(1, 20))
def test_an_even_colour_stays_up_to_the_border(
    crop: tuple[float, float, float, float], degrees: float, side: int, size: int
) -> None:
    batch = turned(make_batch((), 1, side), degrees, crop)
    result = apply_geometry(replace(batch, images=torch.full_like(batch.images, 200)), (), size)
    assert (result.images == 200).all()


def test_the_margin_is_unknown_to_every_task_and_grey() -> None:
    batch = turned(make_batch(ALL, 2, 16), 10, (-0.5, -0.5, 2.0, 2.0))
    batch = replace(batch, photometric={"brightness": torch.tensor([0.2, 1.9]), "contrast": torch.tensor([0.3, 1.7])})
    prepared = prepare_batch(batch, ALL, 24)
    inside = apply_geometry(batch, ALL, 24).inside
    assert inside is not None
    assert 0.15 < inside.float().mean() < 0.35
    assert (prepared.images.permute(0, 2, 3, 1)[~inside] == 0).all()
    for spec in DENSE:
        target = prepared.targets[spec.name]
        assert target.values.isfinite().all()
        assert not target.mask[:, 0][~inside].any()
        assert target.mask[:, 0][inside].any()


@pytest.mark.parametrize("degrees", [0.0, 2.0, 30.0, 90.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_shrinking_while_turning_averages(degrees: float, axis: int) -> None:
    """Stripes one pixel wide become grey, wherever they run to."""
    tasks = resolve_tasks(["edge_texture"])
    stripes = (torch.arange(64)[:, None] if axis else torch.arange(64)) % 2 * 250
    batch = replace(make_batch(tasks, 1, 64), images=stripes.expand(1, 3, 64, 64).to(torch.uint8))
    result = apply_geometry(turned(batch, degrees, (0.2, 0.2, 0.6, 0.6)), tasks, 8)
    assert (result.images.float() - 125).abs().max() < 10


def test_colours_change_when_a_batch_is_prepared() -> None:
    tasks = resolve_tasks(["normal", "keypoints2d"])
    plain = make_batch(tasks, 2, 8)
    darker = prepare_batch(replace(plain, photometric={"brightness": torch.tensor([0.5, 0.25])}), tasks, 8)
    expected = plain.images * torch.tensor([0.5, 0.25]).view(2, 1, 1, 1) / 127.5 - 1
    torch.testing.assert_close(darker.images, expected, atol=1e-5, rtol=0)
    same = prepare_batch(plain, tasks, 8)
    for spec in tasks:
        assert torch.equal(darker.targets[spec.name].values, same.targets[spec.name].values)


def test_a_sample_looks_the_same_in_any_batch() -> None:
    config = AugmentConfig(zoom=(0.7, 1.3), rotate_degrees=30, brightness=0.4, contrast=0.4, hue=0.2, blur=0.05)
    samples = [(0, sample) for sample in range(4)]
    full = make_batch(DENSE, 4, 24)
    together = prepare_batch(replace(full, **vars(draw_augmentations(Augment(2, config), samples))), DENSE, 20)
    for row in range(4):
        alone = replace(
            full,
            images=full.images[row : row + 1],
            mask_valid=full.mask_valid[row : row + 1],
            pair_image=torch.zeros(len(DENSE), dtype=torch.int64),
            pair_task=torch.arange(len(DENSE)),
            labels={name: label[row : row + 1] for name, label in full.labels.items()},
            **vars(draw_augmentations(Augment(2, config), samples[row : row + 1])),
        )
        result = prepare_batch(alone, DENSE, 20)
        # An average may round the other way; a rounded code is 1/127.5 of an image.
        assert (result.images[0] - together.images[row]).abs().max() < 0.02
        for spec in DENSE:
            assert torch.equal(result.targets[spec.name].mask[0], together.targets[spec.name].mask[row])
            error = (result.targets[spec.name].values[0] - together.targets[spec.name].values[row]).abs()
            assert (error * result.targets[spec.name].mask[0]).max() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_prepares_the_same_batch() -> None:
    config = AugmentConfig(zoom=(0.7, 1.3), rotate_degrees=30, brightness=0.4, saturation=0.5, hue=0.2, blur=0.05)
    drawn = draw_augmentations(Augment(2, config), [(0, sample) for sample in range(4)])
    batch = replace(make_batch(DENSE, 4, 24), **vars(drawn))
    here = prepare_batch(batch, DENSE, 20)
    there = prepare_batch(batch.to(torch.device("cuda")), DENSE, 20)
    assert (here.images - there.images.cpu()).abs().max() < 0.02
    for spec in DENSE:
        same = here.targets[spec.name].mask == there.targets[spec.name].mask.cpu()
        assert same.float().mean() > 0.999
