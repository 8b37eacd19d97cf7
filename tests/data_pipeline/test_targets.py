"""Targets: each mapping against its formula in plain numpy, masks, and the whole preparation of a batch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, special
from torch import Tensor

from configs.tasks import TASKS, get_task, resolve_tasks
from data_pipeline.batch import Batch
from data_pipeline.targets import Target, blur, depth_metres, prepare_batch, prepare_images, to_target


def target(name: str, stored: Tensor, mask_valid: Tensor | None = None) -> Target:
    spec = get_task(name)
    if mask_valid is None:
        mask_valid = torch.ones(len(stored), *stored.shape[2:], dtype=torch.bool)
    return to_target(spec, stored, mask_valid)


def codes(values: list[int], dtype: torch.dtype = torch.uint16) -> Tensor:
    """One label of height 1: (1, 1, 1, W)."""
    return torch.tensor(values, dtype=torch.int32).to(dtype).reshape(1, 1, 1, -1)


def test_images_span_minus_one_to_one() -> None:
    images = prepare_images(torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2))
    assert images.flatten().tolist() == [-1.0, 1.0]


def test_log_depth_never_wraps_and_masks_the_unknown_code() -> None:
    result = target("depth_zbuffer", codes([0, 511, 65534, 65535]))
    expected = np.log1p(np.array([0, 511, 65534, 65535], dtype=np.float64)) / math.log(65536)
    np.testing.assert_allclose(result.values.flatten(), expected, atol=1e-6)
    assert result.mask.flatten().tolist() == [True, True, True, False]


@given(st.integers(0, 65534))
def test_depth_metres_inverts_log_depth(code: int) -> None:
    metres = depth_metres(TASKS["depth_euclidean"], target("depth_euclidean", codes([code])).values).item()
    assert metres == pytest.approx(code / 512, rel=1e-4, abs=1e-4)


def test_unit_range_clips_and_reshading_takes_one_channel() -> None:
    scale = get_task("edge_texture").scale
    result = target("edge_texture", codes([0, round(scale / 2), 65535]))
    np.testing.assert_allclose(result.values.flatten(), [-1.0, 0.0, 1.0], atol=1e-3)
    gray = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3).expand(1, 3, 1, 3)
    reshading = target("reshading", gray)
    assert reshading.values.shape == (1, 1, 1, 3)
    np.testing.assert_allclose(reshading.values.flatten(), [-1.0, -0.6, 1.0], atol=1e-6)


def test_normals_have_length_one_and_know_their_unknown_code() -> None:
    stored = torch.tensor([[255, 127, 127], [0, 0, 0], [255, 255, 255]], dtype=torch.uint8).T.reshape(1, 3, 1, 3)
    result = target("normals", stored)
    torch.testing.assert_close(result.values.norm(dim=1), torch.ones(1, 1, 3))
    assert result.values[0, 0, 0, 0] > 0.999
    assert result.mask.flatten().tolist() == [True, True, False]
    assert target("normal", stored).mask.all()


def test_curvature_is_standardised_over_two_channels() -> None:
    stored = torch.tensor([127, 127, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
    result = target("principal_curvature", stored)
    np.testing.assert_allclose(result.values.flatten(), [(127 - 123.572) / 31.922, (127 - 120.1) / 21.658], rtol=1e-5)


def test_region_boundary_ignores_the_names_of_regions() -> None:
    ids = np.zeros((16, 16), dtype=np.uint8)
    ids[4:9, 5:12] = 7
    result = target("segment_unsup2d", torch.from_numpy(ids)[None, None])
    renamed = target("segment_unsup2d", torch.from_numpy(np.where(ids == 7, 3, 200).astype(np.uint8))[None, None])
    assert torch.equal(result.values, renamed.values)
    cross = ndimage.generate_binary_structure(2, 1)
    expected = ndimage.maximum_filter(ids, footprint=cross) != ndimage.minimum_filter(ids, footprint=cross)
    spec = replace(get_task("segment_unsup2d"), blur_fraction=0.0)
    sharp = to_target(spec, torch.from_numpy(ids)[None, None], torch.ones(1, 16, 16, dtype=torch.bool))
    np.testing.assert_array_equal(sharp.values[0, 0], expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 40), st.integers(3, 40), st.floats(0.3, 6.0), st.integers(0, 99))
def test_blur_is_a_normalised_gaussian(height: int, width: int, sigma: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.random((height, width))
    mask = generator.random((height, width)) > 0.3
    result = blur(torch.from_numpy(values).float()[None, None], torch.from_numpy(mask)[None, None], sigma)

    def gaussian(field: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(field, sigma, mode="constant", radius=math.floor(4 * sigma))

    weights = gaussian(mask.astype(np.float64))
    known = weights > 1e-6
    np.testing.assert_allclose(
        result[0, 0].numpy()[known], (gaussian(values * mask) / weights.clip(1e-9))[known], atol=2e-4
    )
    assert result.isfinite().all()


def test_occlusion_edges_are_blurred_without_being_clipped() -> None:
    """The official order: rescale with `no_clip`, then a Gaussian of 4 pixels of 256."""
    stored = np.zeros((128, 128), dtype=np.uint16)
    stored[40:90, 64] = 4000
    result = target("edge_occlusion", torch.from_numpy(stored)[None, None])
    official = ndimage.gaussian_filter(2 * stored / (0.00625 * 65535) - 1, 2.0)
    np.testing.assert_allclose(result.values[0, 0, 10:-10, 10:-10], official[10:-10, 10:-10], atol=1e-4)
    assert result.values.max() > 2


def test_occlusion_edges_are_the_same_at_any_resolution() -> None:
    stored = np.zeros((128, 128), dtype=np.uint16)
    stored[:, 63:65] = 4000
    tasks = resolve_tasks(["edge_occlusion"])
    batch = Batch(
        images=torch.zeros(1, 3, 128, 128, dtype=torch.uint8),
        mask_valid=torch.ones(1, 128, 128, dtype=torch.bool),
        pair_image=torch.tensor([0]),
        pair_task=torch.tensor([0]),
        labels={"edge_occlusion": torch.from_numpy(stored)[None, None]},
        global_pairs=torch.tensor([1]),
        flip=torch.tensor([False]),
        crop=torch.tensor([(0.0, 0.0, 1.0, 1.0)]),
        turns=torch.tensor([(3, 1)]),
        keys=("a",),
    )
    means = [prepare_batch(batch, tasks, size).targets["edge_occlusion"].values.mean() for size in (128, 64, 32)]
    np.testing.assert_allclose(means, means[0], atol=0.01)


def test_blurred_edges_ignore_what_mask_valid_excludes() -> None:
    stored = torch.full((1, 1, 64, 64), 100, dtype=torch.int32)
    mask_valid = torch.ones(1, 64, 64, dtype=torch.bool)
    mask_valid[:, 20:40, 20:40] = False
    stored[:, :, 20:40, 20:40] = 65535
    result = target("edge_occlusion", stored.to(torch.uint16), mask_valid)
    torch.testing.assert_close(
        result.values[result.mask], torch.full((64 * 64 - 400,), 2 * 100 / (0.00625 * 65535) - 1), atol=1e-5, rtol=0
    )


def test_class_ids_are_indices_and_unknown_ones_masked() -> None:
    result = target("semseg", codes([0, 20, 21, 255], torch.uint8))
    assert result.values.dtype == torch.int64
    assert result.values.shape == (1, 1, 4)
    assert result.values.flatten().tolist() == [0, 20, 0, 0]
    assert result.mask.flatten().tolist() == [True, True, False, False]


def test_binary_splits_at_half() -> None:
    assert target("saliency", codes([0, 127, 128, 255], torch.uint8)).values.flatten().tolist() == [0, 0, 1, 1]


def test_class_vectors_sum_to_one() -> None:
    logits = torch.randn(3, 1000) * 10
    result = target("class_object", logits)
    np.testing.assert_allclose(result.values, special.softmax(logits.numpy(), axis=1), atol=1e-6)
    assert result.mask.shape == (3, 1)
    probabilities = target("class_scene", torch.rand(3, 365).half())
    torch.testing.assert_close(probabilities.values.sum(1), torch.ones(3))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("count", [0, 2])
def test_shapes_dtypes_and_finite_values_of_every_task(name: str, count: int) -> None:
    spec = get_task(name)
    shape = (count, spec.encoding.channels, 8, 8) if spec.dense else (count, spec.encoding.channels)
    high = {"uint8": 256, "uint16": 65536, "float32": 3}[spec.encoding.dtype]
    stored = torch.randint(0, high, shape).to(getattr(torch, spec.encoding.dtype))
    mask_valid = torch.rand(count, 8, 8) > 0.5
    result = to_target(spec, stored, mask_valid)
    assert result.mask.dtype == torch.bool
    assert result.values.isfinite().all()
    if spec.target == "class_ids":
        assert (result.values.shape, result.values.dtype) == ((count, 8, 8), torch.int64)
    elif spec.dense:
        assert (result.values.shape, result.values.dtype) == ((count, spec.channels, 8, 8), torch.float32)
    else:
        assert (result.values.shape, result.values.dtype) == ((count, spec.channels), torch.float32)
    if spec.dense:
        assert result.mask.shape == (count, 1, 8, 8)
        if spec.uses_mask_valid:
            assert not result.mask[~mask_valid.unsqueeze(1)].any()


def test_prepare_batch_carries_geometry_masks_and_pairs() -> None:
    tasks = resolve_tasks(["depth_zbuffer", "normal", "class_scene"])
    normal = torch.tensor([255, 127, 127], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    mask_valid = torch.ones(2, 8, 8, dtype=torch.bool)
    mask_valid[1, :, :2] = False
    batch = Batch(
        images=torch.full((2, 3, 8, 8), 255, dtype=torch.uint8),
        mask_valid=mask_valid,
        pair_image=torch.tensor([0, 1, 1]),
        pair_task=torch.tensor([0, 0, 1]),
        labels={
            "depth_zbuffer": torch.full((2, 1, 8, 8), 511, dtype=torch.int32).to(torch.uint16),
            "normal": normal,
            "class_scene": torch.empty(0, 365),
        },
        global_pairs=torch.tensor([4, 4, 0]),
        flip=torch.tensor([False, True]),
        crop=torch.tensor([(0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 0.5)]),
        turns=torch.tensor([(5, 0), (2, 1)]),
        keys=("a", "b"),
    )
    prepared = prepare_batch(batch, tasks, 4)
    assert prepared.images.shape == (2, 3, 4, 4)
    assert torch.equal(prepared.turns, batch.turns)
    assert (prepared.images == 1.0).all()
    depth = prepared.targets["depth_zbuffer"]
    torch.testing.assert_close(depth.values, torch.full((2, 1, 4, 4), 9 / 16))
    assert depth.mask[0].all()
    # The crop keeps columns 0..3 of 8, of which 0 and 1 are unknown; mirrored, they are on the right.
    assert depth.mask[1, 0, 0].tolist() == [True, True, False, False]
    assert prepared.targets["normal"].values[0, 0, 0, 0] < -0.999
    assert prepared.targets["class_scene"].values.shape == (0, 365)
    assert prepared.keys == ("a", "b")
    assert torch.equal(prepared.global_pairs, batch.global_pairs)
