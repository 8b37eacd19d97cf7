"""The labels of a room tell one and the same geometry, by the laws of the official files."""

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.rooms import labels_taskonomy
from data_pipeline.sample import Sample
from tests.data_pipeline.rooms.views import a_view

Array = NDArray[np.float64]


def rays(sample: Sample) -> Array:
    """(n, n, 3) rays through pixel centres with depth 1, in the axes of stored normals (x right, y down, z forward)."""
    n = len(sample.rgb)
    across = (np.arange(n) + 0.5 - n / 2) / sample.meta["focal_pixels"]
    x, y = np.broadcast_to(across[None], (n, n)), np.broadcast_to(across[:, None], (n, n))
    return np.stack([x, y, np.ones((n, n))], -1)


def decoded(label: NDArray[np.uint8]) -> Array:
    return label.astype(float) / 127.5 - 1


def test_unknown_depth_is_exactly_where_the_mask_says(rooms: list[Sample]) -> None:
    panes = 0
    for sample in rooms:
        assert sample.mask_valid is not None
        invalid = sample.mask_valid == 0
        panes += bool(invalid.any())
        for task in ("depth_zbuffer", "depth_euclidean"):
            assert np.array_equal(sample.labels[task] == 65535, invalid)
        white = (sample.labels["normals"] == 255).all(-1)
        assert np.array_equal(white, invalid)
    assert panes >= 3


def test_euclidean_depth_is_the_length_of_the_back_projection(rooms: list[Sample]) -> None:
    for sample in rooms:
        z, e = (sample.labels[task].astype(float) for task in ("depth_zbuffer", "depth_euclidean"))
        known = z < 65535
        length = np.linalg.norm(rays(sample), axis=-1) * z
        assert np.abs(length - e)[known].max() < 1.6  # both are rounded to 1/512 m


def test_normals_are_unit_and_face_the_camera(rooms: list[Sample]) -> None:
    blue, straight_on = [], []
    for sample in rooms:
        stored = sample.labels["normal"]
        vectors = decoded(stored)
        assert np.abs(np.linalg.norm(vectors, axis=-1) - 1).max() < 0.01
        ray = rays(sample)
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
        assert (vectors * ray).sum(-1).max() < 0.02
        blue.append(stored[..., 2].mean())
        straight_on.append(stored[24:40, 24:40, 2].max())
    # Facing the camera is facing against the ray; away from the middle of a wide picture that may be z > 0.
    assert np.mean(blue) < 100
    assert max(straight_on) <= 127 + 30


def test_normals_agree_with_depth_on_flat_parts(rooms: list[Sample]) -> None:
    cosines = []
    reach = 4
    for sample in rooms:
        stored = sample.labels["normal"]
        points = rays(sample) * (sample.labels["depth_zbuffer"] / 512)[..., None]
        n = len(stored)
        inner = slice(reach, n - reach)
        flat = np.ones((n - 2 * reach,) * 2, bool)
        for i in range(-reach, reach + 1):
            for j in range(-reach, reach + 1):
                moved = stored[reach + i : n - reach + i, reach + j : n - reach + j]
                same_plane = (moved == stored[inner, inner]).all(-1)
                offset = points[reach + i : n - reach + i, reach + j : n - reach + j] - points[inner, inner]
                flat &= same_plane & (np.abs((offset * decoded(stored[inner, inner])).sum(-1)) < 0.02)
        across = points[inner, 2 * reach :] - points[inner, : n - 2 * reach]
        down = points[2 * reach :, inner] - points[: n - 2 * reach, inner]
        normal = np.cross(across, down)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        told = decoded(stored[inner, inner])
        told /= np.linalg.norm(told, axis=-1, keepdims=True)  # bytes round its length
        cosines.append(np.abs((normal * told).sum(-1))[flat])
    cosine = np.concatenate(cosines)
    assert len(cosine) > 2000
    assert np.median(cosine) > 0.9995
    assert np.quantile(cosine, 0.02) > 0.99


def test_flat_pixels_have_no_curvature_and_round_ones_have(rooms: list[Sample]) -> None:
    curvature = np.concatenate([sample.labels["principal_curvature"].reshape(-1, 3) for sample in rooms])
    assert (curvature[:, 2] == 0).all()
    magnitude = np.abs(curvature.astype(int) - 127)
    assert (magnitude[:, 0] >= magnitude[:, 1]).all()
    flat = (curvature[:, :2] == 127).all(1)
    assert 0.5 < flat.mean() < 0.99


def test_reshading_is_gray_and_darkens_with_distance(rooms: list[Sample]) -> None:
    for sample in rooms:
        light = sample.labels["reshading"]
        assert (light == light[..., :1]).all()
        vectors, ray = decoded(sample.labels["normal"]), rays(sample)
        facing = -(vectors * ray).sum(-1) / np.linalg.norm(ray, axis=-1)
        metres = sample.labels["depth_euclidean"] / 512
        expected = np.minimum(2.05 * facing / metres, 1) * 255
        sure = (sample.labels["depth_euclidean"] < 65535) & (facing > 0.2)
        assert np.abs(light[..., 0] - expected)[sure].max() < 6


def test_where_depth_jumps_there_is_a_boundary_and_an_occlusion_edge(rooms: list[Sample]) -> None:
    found = []
    for sample in rooms:
        depth = sample.labels["depth_zbuffer"].astype(float) / 512
        known = depth < 100
        here, right = depth[:, :-1], depth[:, 1:]
        jump = (np.abs(here - right) > 0.6) & known[:, :-1] & known[:, 1:]
        edges, occlusion = sample.labels["edges"][:, :-1], sample.labels["edge_occlusion"][:, :-1]
        found.append(np.stack([edges[jump] > 0, occlusion[jump] > np.median(occlusion)], 1))
        assert 0.01 < (edges > 0).mean() < 0.5
    share = np.concatenate(found).mean(0)
    assert len(np.concatenate(found)) > 500
    assert (share > 0.9).all(), share


def test_salient_things_are_few_and_not_everything(rooms: list[Sample]) -> None:
    shares = [float((sample.labels["saliency"] > 0).mean()) for sample in rooms]
    assert max(shares) < 0.8
    assert np.mean(shares) > 0.02


def test_region_ids_fit_a_byte_and_are_several(rooms: list[Sample]) -> None:
    for sample in rooms:
        for task in ("segment_unsup2d", "segment_unsup25d"):
            assert 3 < len(np.unique(sample.labels[task])) <= 256


def test_green_tells_floors_from_ceilings_as_in_the_official_files(rooms: list[Sample]) -> None:
    """y points down there: what faces up (floors, table tops) is dark, what faces down is bright."""
    lower = [sample.labels["normal"][-8:, :, 1].mean() for sample in rooms]
    upper = [sample.labels["normal"][:8, :, 1].mean() for sample in rooms]
    assert np.mean(lower) < 110 < np.mean(upper)


@pytest.mark.parametrize("size", [64, 128, 512])
def test_gradients_mean_the_same_at_every_size(size: int) -> None:
    ramp = np.broadcast_to((np.arange(size) + 0.5) / size, (size, size))
    rgb = np.repeat(np.rint(ramp * 255)[..., None], 3, -1).astype(np.uint8)
    view = a_view(size, rgb=rgb, depth=(2 + ramp).astype(np.float32))
    inner = slice(size // 4, -size // 4)
    # Sobel's filter gives 8 times the slope per pixel of 512; the files hold it over sqrt(32).
    brightness = labels_taskonomy.edge_texture(view)[inner, inner]
    assert brightness.mean() == pytest.approx(65535 * 8 / 512 / np.sqrt(32), rel=0.02)
    slope = 512 / 2 / np.sqrt(512 * 2.5) / 256 / 512
    occlusion = labels_taskonomy.edge_occlusion(view)[size // 2, size // 2]
    assert occlusion == pytest.approx(65535 * 8 * slope / np.sqrt(32), rel=0.05)


def test_keypoints_are_centred_on_blobs() -> None:
    rgb = np.zeros((128, 128, 3), np.uint8)
    rgb[59:68, 43:52] = 255
    response = labels_taskonomy.keypoints2d(a_view(128, rgb=rgb)).astype(float)
    mirrored = response[:127, :95]  # the blob's centre is pixel (63, 47)
    np.testing.assert_array_equal(mirrored, mirrored[::-1, ::-1])
    assert response[63, 47] > 0.5 * response.max() > 300


def test_the_stronger_curvature_comes_first_and_convex_is_bright() -> None:
    curvature = np.zeros((2, 32, 32), np.float32)
    curvature[:, 0, 0], curvature[:, 0, 1], curvature[:, 0, 2] = (4, 1), (2, -8), (90, 0)
    codes = labels_taskonomy.principal_curvature(a_view(32, curvature=curvature))
    np.testing.assert_array_equal(codes[0, :4], [[142, 131, 0], [97, 135, 0], [254, 127, 0], [127, 127, 0]])


def test_a_bare_wall_has_every_object_class_alike() -> None:
    logits = labels_taskonomy.class_object(a_view(32))
    np.testing.assert_allclose(np.exp(logits), 1e-3, rtol=1e-5)
