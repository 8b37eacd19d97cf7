"""Stored values of other datasets become the official encodings, exactly; what cannot be meant is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from configs.errors import UserError
from configs.task_definitions import defined_in
from configs.tasks import TASKS, VOC_CLASSES
from data_pipeline.sources.class_map import numbers_of
from data_pipeline.sources.folder_labels import (
    BinaryLabel,
    ClassesLabel,
    CodesLabel,
    DepthLabel,
    NormalLabel,
    RegionsLabel,
)

DEPTH, NORMAL, NORMALS, SEMSEG = (TASKS[name] for name in ("depth_zbuffer", "normal", "normals", "semseg"))


def depth_codes(array: Any, **rule: Any) -> list[int]:
    found = DepthLabel(path="x", **rule).convert(DEPTH, np.atleast_2d(array))
    assert found.codes.dtype == np.uint16
    assert found.known is not None
    np.testing.assert_array_equal(found.known, found.codes != 65535)
    return found.codes.reshape(-1).tolist()


def test_depth_in_metres_millimetres_and_inverse() -> None:
    assert depth_codes(np.array([1.0, 0.5, 2.25], np.float32)) == [512, 256, 1152]
    assert depth_codes(np.array([1000, 500, 2250], np.uint16), unit_metres=0.001) == [512, 256, 1152]
    assert depth_codes(np.array([1.0, 2.0, 0.5]), inverse=True) == [512, 256, 1024]
    assert depth_codes(np.array([30.0, 90.0]), inverse=True, unit_metres=200.0, offset=10.0) == [2560, 1024]
    assert depth_codes(np.array([5.0, 6.0]), unit_metres=0.5, offset=-4.0) == [256, 512]


def test_depth_is_unknown_where_it_cannot_be_one() -> None:
    nothing = [65535] * 5
    assert depth_codes(np.array([np.nan, np.inf, -np.inf, 0.0, -1.0])) == nothing
    assert depth_codes(np.array([np.nan, np.inf, -np.inf, 0.0, -1.0]), inverse=True) == nothing
    assert depth_codes(np.array([0, 7, 1], np.uint16), invalid=[7]) == [65535, 65535, 512]
    assert depth_codes(np.array([0, 1], np.uint8), invalid=0, offset=1.0) == [65535, 1024]
    assert depth_codes(np.array([127.99, 127.999, 128.0, 1e9])) == [65531, 65535, 65535, 65535]


@given(arrays(np.float64, (3, 4), elements=st.floats(allow_nan=True, allow_infinity=True)), st.booleans())
def test_any_depth_has_a_code(array: NDArray[np.float64], inverse: bool) -> None:
    label = DepthLabel(path="x", inverse=inverse)
    with np.errstate(all="ignore"):
        metres = 1.0 / array if inverse else array
    found = label.convert(DEPTH, array)
    near = np.isfinite(array) & (metres > 0) & (metres < 127.99)
    assert found.known is not None
    np.testing.assert_array_equal(found.known[near], True)
    np.testing.assert_allclose(found.codes[near] / 512, metres[near], atol=1 / 1024)
    assert not found.known[~np.isfinite(array) | (metres <= 0) | (metres > 128)].any()


def unit(*vector: float) -> NDArray[np.float32]:
    return (np.array(vector) / np.linalg.norm(vector)).astype(np.float32)


def test_normals_turn_their_axes() -> None:
    vectors = np.stack([unit(1, 2, 3), unit(-1, 0, 0.5)])[None]
    plain = NormalLabel(path="x").convert(NORMAL, vectors).codes
    np.testing.assert_array_equal(plain, np.rint((vectors + 1) * 127.5))
    turned = NormalLabel(path="x", axes=("-x", "z", "-y")).convert(NORMAL, vectors).codes
    expected = np.stack([-vectors[..., 0], vectors[..., 2], -vectors[..., 1]], -1)
    np.testing.assert_array_equal(turned, np.rint((expected + 1) * 127.5))
    first = NormalLabel(path="x").convert(NORMAL, np.moveaxis(vectors, 2, 0)).codes
    np.testing.assert_array_equal(first, plain)


def test_eight_bit_normals_keep_their_direction() -> None:
    codes = np.rint((np.stack([unit(1, 2, 3), unit(0, 0, 1)])[None] + 1) * 127.5).astype(np.uint8)
    again = NormalLabel(path="x").convert(NORMAL, codes).codes
    assert np.abs(again.astype(int) - codes).max() <= 1


def test_normals_are_unknown_where_they_have_no_direction() -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [127, 127, 127], [128, 128, 255]]], np.uint8)
    found = NormalLabel(path="x").convert(NORMALS, colours)
    assert found.known is not None
    assert found.known.tolist() == [[False, False, False, True]]
    assert found.codes[0, :3].tolist() == [[255] * 3] * 3
    floats = np.array([[[np.nan] * 3, [0.0] * 3, [0.0, 0.0, 1.0]]])
    assert NormalLabel(path="x").convert(NORMAL, floats).codes.tolist() == [[[127] * 3, [127] * 3, [128, 128, 255]]]


def test_normals_that_are_encoded_otherwise_are_refused() -> None:
    vectors = np.stack([unit(1, 2, 3), unit(0, 0.2, 1), unit(0.1, -0.2, 1)])[None]
    for wrong in ((vectors + 1) / 2, vectors * 100):
        with pytest.raises(UserError, match="long, not 1: floats must lie in"):
            NormalLabel(path="x").convert(NORMAL, wrong)
    with pytest.raises(UserError, match=r"normals are 8-bit RGB or floats \(H, W, 3\)"):
        NormalLabel(path="x").convert(NORMAL, np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="name each of x, y and z once"):
        NormalLabel(path="x", axes=("x", "x", "z"))


def classes(array: Any, **rule: Any) -> list[int]:
    found = ClassesLabel(path="x", **rule).convert(SEMSEG, np.asarray(array))
    assert found.codes.dtype == np.uint8
    return found.codes.reshape(-1).tolist()


def test_ids_are_mapped() -> None:
    assert classes([[0, 20, 255]]) == [0, 20, 255]
    assert classes([[3, 3, 7]], void=(7,)) == [3, 3, 255]
    rule = {"map": {0: 0, "1-3": "person", 9: "void"}, "void": ("100-200",)}
    assert classes(np.array([[0, 1, 3, 9, 150]], np.uint16), **rule) == [0, 15, 15, 255, 255]
    assert classes([[0, 1, 77]], map={0: 4}, others="void") == [4, 255, 255]
    assert classes([[0, 77]], map={0: 4}, others="cat") == [4, VOC_CLASSES.index("cat")]
    assert classes([[-1, 0]], map={0: 4, -1: "void"}) == [255, 4]
    assert classes([[True, False]], map={"0": 0, "1": 15}) == [15, 0]
    assert classes(np.array([[2.0, 0.0]])) == [2, 0]


def test_colours_are_mapped() -> None:
    image = np.array([[[255, 0, 0], [0, 128, 255], [0, 0, 0]]], np.uint8)
    assert classes(image, map={"#ff0000": "dog", "#0080FF": 3}, void=("#000000",)) == [12, 3, 255]
    grey = np.repeat(np.array([[[5], [9]]], np.uint8), 3, axis=2)
    assert classes(grey, map={5: 1, 9: 2}) == [1, 2]
    with pytest.raises(UserError, match="the file holds colours"):
        classes(image)
    with pytest.raises(UserError, match="#0080ff, which is in neither `map` nor `void`"):
        classes(image, map={"#ff0000": 1, "#000000": 0})


@pytest.mark.parametrize(
    ("array", "rule", "message"),
    [
        ([[0, 21]], {}, "holds 21, which is in neither"),
        ([[0, 5]], {"map": {0: 0}}, "holds 5, which is in neither"),
        ([[0.5]], {}, "no whole numbers"),
        ([[np.nan]], {}, "no whole numbers"),
        ([0, 1], {}, r"shape \(2,\)"),
        (np.zeros((2, 2, 4), np.uint8), {}, r"shape \(2, 2, 4\)"),
        (np.array([["a"]]), {}, "must hold numbers"),
        ([[1]], {"map": {"#000001": 1}}, "told by colours, but the file holds int64"),
    ],
)
def test_what_is_no_class_is_refused(array: Any, rule: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        classes(array, **rule)


def test_rules_that_cannot_be_are_refused() -> None:
    for rule, message in (
        ({"map": {"wall": 1}}, "'wall' is a name, but pixels hold numbers"),
        ({"map": {"5-3": 1}}, "range '5-3' must go up"),
        ({"void": ("0-99999999",)}, "must go up, by less than 65536"),
        ({"others": 0}, "give a `map` too"),
        ({"map": {True: 1}}, "valid"),
        ({"map": {"1-5": 7, 3: 9}}, "'1-5' and 3 both name 3: give it one class"),
        ({"map": {3: 9, "1-5": 7}}, "3 and '1-5' both name 3"),
        ({"map": {"#ff0000": 1, "#FF0000": 2}}, "both name"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassesLabel.model_validate({"path": "x", **rule})
    for target in (21, -1, "wall", 256):
        with pytest.raises(ValueError, match="is no class of 'semseg'"):
            ClassesLabel(path="x", map={0: target}).check_task(SEMSEG)


@given(st.integers(0, 300), st.integers(0, 40))
def test_ranges_hold_both_ends(low: int, more: int) -> None:
    assert numbers_of([f"{low}-{low + more}"]) == list(range(low, low + more + 1))


def binary(array: Any, **rule: Any) -> list[int]:
    return BinaryLabel(path="x", **rule).convert(TASKS["saliency"], np.asarray(array)).codes.reshape(-1).tolist()


def test_yes_and_no() -> None:
    assert binary([[0, 1, 255]]) == [0, 255, 255]
    assert binary([[False, True]]) == [0, 255]
    assert binary([[0, 127, 128]], threshold=127) == [0, 0, 255]
    assert binary([[-0.5, 0.4, 0.6]], threshold=0.5) == [0, 0, 255]
    assert binary([[0, 1, 2, 3, 9]], positive=("1-2", 9)) == [0, 255, 255, 0, 255]
    image = np.array([[[255, 0, 0], [1, 1, 1]]], np.uint8)
    assert binary(image, positive=("#ff0000",)) == [255, 0]
    with pytest.raises(ValueError, match="give one of"):
        BinaryLabel(path="x", threshold=1, boundaries=True)


def test_boundaries_are_drawn_at_the_packed_size() -> None:
    label = BinaryLabel(path="x", boundaries=True)
    ids = np.array([[7, 7, 1000], [7, 7, 1000]])
    found = label.convert(TASKS["edges"], ids).codes
    assert label.finish(found[:, ::2]).tolist() == [[255, 0], [255, 0]]
    assert label.finish(found).tolist() == [[0, 255, 0], [0, 255, 0]]


def test_regions_keep_their_borders() -> None:
    spec = TASKS["segment_unsup2d"]
    ids = np.array([[70000, 3], [3, 70000]])
    assert RegionsLabel(path="x").convert(spec, ids).codes.tolist() == [[1, 0], [0, 1]]
    colours = np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8)
    assert RegionsLabel(path="x").convert(spec, colours).codes.tolist() == [[1, 0]]
    with pytest.raises(UserError, match="257 regions, but the encoding at most 256"):
        RegionsLabel(path="x").convert(spec, np.arange(257)[None])


def test_codes_are_stored_or_scaled() -> None:
    texture = TASKS["edge_texture"]
    assert CodesLabel(path="x").convert(texture, np.array([[0, 65535]], np.uint16)).codes.tolist() == [[0, 65535]]
    scaled = CodesLabel(path="x", times=65535.0).convert(texture, np.array([[0.0, 0.5, 1.0, 2.0]]))
    assert scaled.codes.tolist() == [[0, 32768, 65535, 65535]]
    assert scaled.codes.dtype == np.uint16
    shading = CodesLabel(path="x").convert(TASKS["reshading"], np.array([[7, 9]], np.uint8))
    assert shading.codes.tolist() == [[[7] * 3, [9] * 3]]
    for wrong, message in ((np.array([[-1.0]]), "negative"), (np.array([[np.nan]]), "not finite")):
        with pytest.raises(UserError, match=message):
            CodesLabel(path="x").convert(texture, wrong)
    with pytest.raises(UserError, match=r"must hold numbers \(H, W, 3\)"):
        CodesLabel(path="x").convert(TASKS["principal_curvature"], np.zeros((2, 2), np.uint8))


def test_a_map_with_a_code_for_unknown_may_lack_values() -> None:
    definitions = {"heat": {"like": "keypoints2d", "invalid": 65535}, "cold": {"like": "keypoints2d", "invalid": 0}}
    table = defined_in({"define_tasks": definitions}, "own.yaml")
    label = CodesLabel(path="x", times=100.0, invalid=[-9999])
    array = np.array([[np.nan, -9999.0, 0.5, 1e6]])
    assert label.convert(table["heat"], array).codes.tolist() == [[65535, 65535, 50, 65534]]
    assert label.convert(table["cold"], array).codes.tolist() == [[0, 0, 50, 65535]]
    with pytest.raises(UserError, match="negative"):
        label.convert(table["heat"], np.array([[-1.0]]))
    label.check_task(table["heat"])
    with pytest.raises(ValueError, match="invalid: task 'keypoints2d' has no code for unknown"):
        label.check_task(TASKS["keypoints2d"])


def test_depths_are_counted_as_the_task_says() -> None:
    definition = {"like": "depth_zbuffer", "codes_per_metre": 64, "invalid": 0}
    far = defined_in({"define_tasks": {"far": definition}}, "own.yaml")["far"]
    found = DepthLabel(path="x").convert(far, np.array([[1.0, 900.0, 1023.9, 1024.0, np.nan]]))
    assert found.codes.tolist() == [[64, 57600, 65530, 0, 0]]
    assert found.known is not None
    assert found.known.tolist() == [[True, True, True, False, False]]
