"""Geometry: exact values for ids and depths, masked means for smooth maps, mirrored normals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from configs.tasks import TaskSpec, resolve_tasks
from data_pipeline.batch import Batch
from data_pipeline.transforms import apply_geometry, pair_images

FULL = (0.0, 0.0, 1.0, 1.0)


def make_batch(tasks: tuple[TaskSpec, ...], count: int, side: int, seed: int = 0) -> Batch:
    """A batch of random codes in which every image serves every task."""
    generator = np.random.default_rng(seed)
    labels = {}
    for spec in tasks:
        encoding = spec.encoding
        shape = (count, encoding.channels, side, side) if spec.dense else (count, encoding.channels)
        if encoding.dtype == "float32":
            labels[spec.name] = torch.from_numpy(generator.random(shape, dtype=np.float32))
        else:
            codes = generator.integers(0, np.iinfo(encoding.dtype).max + 1, shape)
            labels[spec.name] = torch.from_numpy(codes.astype(encoding.dtype))
    images = torch.from_numpy(generator.integers(0, 256, (count, 3, side, side)).astype(np.uint8))
    return Batch(
        images=images,
        mask_valid=torch.from_numpy(generator.random((count, side, side)) > 0.2),
        pair_image=torch.arange(count).repeat(len(tasks)),
        pair_task=torch.arange(len(tasks)).repeat_interleave(count),
        labels=labels,
        global_pairs=torch.full((len(tasks),), count),
        flip=torch.zeros(count, dtype=torch.bool),
        crop=torch.tensor([FULL]).expand(count, 4).clone(),
        turns=torch.zeros(count, 2, dtype=torch.int64),
        keys=tuple(f"view{index}" for index in range(count)),
    )


ALL = resolve_tasks(["taskonomy", "pascal_context"])


@pytest.mark.parametrize("side", [7, 64, 224])
def test_full_crop_at_stored_side_changes_no_value(side: int) -> None:
    tasks = resolve_tasks(["depth_zbuffer", "keypoints2d", "reshading", "normal", "class_scene"])
    batch = make_batch(tasks, 2, side)
    batch = replace(batch, mask_valid=torch.ones_like(batch.mask_valid))
    result = apply_geometry(batch, tasks, side)
    assert torch.equal(result.images, batch.images)
    assert torch.equal(result.mask_valid, batch.mask_valid)
    for spec in tasks:
        assert torch.equal(result.labels[spec.name].to(torch.float64), batch.labels[spec.name].to(torch.float64))


crops = st.tuples(
    st.floats(0.25, 1.0, width=32), st.floats(0.25, 1.0, width=32), st.floats(0, 1, width=32), st.floats(0, 1, width=32)
).map(lambda t: (t[2] * (1 - t[0]), t[3] * (1 - t[1]), t[0], t[1]))


@settings(max_examples=60, deadline=None)
@given(
    crop=st.lists(crops, min_size=2, max_size=2),
    flip=st.lists(st.booleans(), min_size=2, max_size=2),
    side=st.integers(2, 40),
    size=st.integers(1, 48),
    seed=st.integers(0, 9),
)
def test_nearest_labels_keep_exact_codes(
    crop: list[tuple[float, float, float, float]], flip: list[bool], side: int, size: int, seed: int
) -> None:
    tasks = tuple(spec for spec in ALL if spec.dense and spec.interpolation == "nearest" and not spec.oriented)
    batch = replace(make_batch(tasks, 2, side, seed), crop=torch.tensor(crop), flip=torch.tensor(flip))
    result = apply_geometry(batch, tasks, size)
    for spec in tasks:
        before, after = batch.labels[spec.name].numpy(), result.labels[spec.name].numpy()
        assert after.shape == (2, spec.encoding.channels, size, size)
        for image in range(2):
            assert set(after[image].ravel().tolist()) <= set(before[image].ravel().tolist())


@settings(max_examples=30, deadline=None)
@given(crop=crops, side=st.integers(2, 30), size=st.integers(1, 30), seed=st.integers(0, 9))
def test_mirroring_reverses_columns_of_everything(
    crop: tuple[float, float, float, float], side: int, size: int, seed: int
) -> None:
    tasks = resolve_tasks(["depth_euclidean", "semseg", "reshading"])
    batch = replace(make_batch(tasks, 1, side, seed), crop=torch.tensor([crop]))
    plain = apply_geometry(batch, tasks, size)
    mirrored = apply_geometry(replace(batch, flip=torch.tensor([True])), tasks, size)
    assert torch.equal(mirrored.images, plain.images.flip(-1))
    assert torch.equal(mirrored.mask_valid, plain.mask_valid.flip(-1))
    for spec in tasks:
        assert torch.equal(mirrored.labels[spec.name], plain.labels[spec.name].flip(-1))


def test_half_size_full_crop_matches_antialiased_interpolation() -> None:
    tasks = resolve_tasks(["edge_texture"])
    batch = make_batch(tasks, 3, 32)
    result = apply_geometry(batch, tasks, 13)
    images = functional.interpolate(batch.images.float(), size=(13, 13), mode="bilinear", antialias=True)
    label = functional.interpolate(
        batch.labels["edge_texture"].to(torch.float32), size=(13, 13), mode="bilinear", antialias=True
    )
    assert (result.images.float() - images).abs().max() < 0.51
    assert (result.labels["edge_texture"].float() - label).abs().max() < 0.51


def test_each_image_takes_its_own_crop() -> None:
    tasks = resolve_tasks(["segment_unsup2d"])
    batch = make_batch(tasks, 4, 16)
    quarters = [(0.0, 0.0, 0.5, 0.5), (0.0, 0.5, 0.5, 0.5), (0.5, 0.0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)]
    result = apply_geometry(replace(batch, crop=torch.tensor(quarters)), tasks, 8)
    for image, (top, left, _, _) in enumerate(quarters):
        rows, columns = slice(int(top * 16), int(top * 16) + 8), slice(int(left * 16), int(left * 16) + 8)
        assert torch.equal(
            result.labels["segment_unsup2d"][image], batch.labels["segment_unsup2d"][image, :, rows, columns]
        )
        assert torch.equal(result.mask_valid[image], batch.mask_valid[image, rows, columns])


def test_unknown_pixels_do_not_bleed_into_averages() -> None:
    tasks = resolve_tasks(["keypoints3d"])
    batch = make_batch(tasks, 1, 16)
    known = batch.mask_valid.unsqueeze(1)
    codes = torch.where(known, 1000, 60000).to(torch.int32).to(torch.uint16)
    for size in (5, 16, 40):
        result = apply_geometry(replace(batch, labels={"keypoints3d": codes}), tasks, size)
        assert (result.labels["keypoints3d"][result.mask_valid.unsqueeze(1)] == 1000).all()


def test_flip_negates_x_of_normals_and_keeps_the_unknown_code() -> None:
    tasks = resolve_tasks(["normals"])
    batch = replace(make_batch(tasks, 2, 8), flip=torch.tensor([True, False]))
    batch.labels["normals"][:, :, 0, 0] = 255
    result = apply_geometry(batch, tasks, 8).labels["normals"]
    source = batch.labels["normals"]
    expected = source[0].flip(-1).clone()
    expected[0] = torch.where((expected == 255).all(0), expected[0], 255 - expected[0])
    assert torch.equal(result[0], expected)
    assert (result[0, :, 0, 7] == 255).all()
    assert torch.equal(result[1], source[1])


def test_partial_and_empty_pairs() -> None:
    tasks = resolve_tasks(["depth_zbuffer", "class_scene", "segment_unsup2d"])
    full = make_batch(tasks, 3, 8)
    batch = replace(
        full,
        pair_image=torch.tensor([2, 0, 1]),
        pair_task=torch.tensor([0, 1, 1]),
        labels={
            "depth_zbuffer": full.labels["depth_zbuffer"][2:],
            "class_scene": full.labels["class_scene"][:2],
            "segment_unsup2d": full.labels["segment_unsup2d"][:0],
        },
        crop=torch.tensor([FULL, FULL, (0.5, 0.0, 0.5, 0.5)]),
    )
    assert [image.tolist() for image in pair_images(batch, tasks)] == [[2], [0, 1], []]
    result = apply_geometry(batch, tasks, 4)
    assert torch.equal(result.labels["depth_zbuffer"][0].int(), full.labels["depth_zbuffer"][2, :, 4:, :4].int())
    assert torch.equal(result.labels["class_scene"], full.labels["class_scene"][:2])
    assert result.labels["segment_unsup2d"].shape == (0, 1, 4, 4)


def test_a_batch_without_images() -> None:
    tasks = resolve_tasks(["normal", "keypoints2d", "class_object"])
    result = apply_geometry(make_batch(tasks, 0, 8), tasks, 4)
    assert result.images.shape == (0, 3, 4, 4)
    assert result.labels["normal"].shape == (0, 3, 4, 4)


def test_applying_twice_changes_nothing_more() -> None:
    tasks = resolve_tasks(["normal", "reshading", "depth_zbuffer"])
    batch = replace(
        make_batch(tasks, 2, 20), flip=torch.tensor([True, False]), crop=torch.tensor([(0.1, 0.2, 0.5, 0.7), FULL])
    )
    once = apply_geometry(batch, tasks, 12)
    twice = apply_geometry(once, tasks, 12)
    assert torch.equal(once.images, twice.images)
    for spec in tasks:
        mask = once.mask_valid.unsqueeze(1).expand_as(once.labels[spec.name])
        assert torch.equal(once.labels[spec.name][mask], twice.labels[spec.name][mask])
