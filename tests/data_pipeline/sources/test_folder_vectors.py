"""Class labels of whole images from files, cells and names of folders."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from configs.errors import UserError
from configs.tasks import TASKS
from data_pipeline.sources.folder_vectors import VectorLabel

SCENE, OBJECT = TASKS["class_scene"], TASKS["class_object"]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exponents = np.exp(logits.astype(np.float64) - logits.max())
    return exponents / exponents.sum()


@pytest.mark.parametrize(
    ("text", "rule", "expected"),
    [
        ("7", {}, 7),
        ("kitchen", {"map": {"kitchen": 203}}, 203),
        ("12", {"map": {"10-20": 9, 5: 4}}, 9),
        (" 5 ", {"map": {"10-20": 9, 5: 4}}, 4),
        ("007", {"map": {7: 1}}, 1),
        ("#ff0000", {"map": {"#ff0000": 3}}, 3),
    ],
)
def test_a_class_in_a_field(text: str, rule: dict[str, Any], expected: int) -> None:
    label = VectorLabel(value="scene", **rule)
    probabilities = label.from_fields(SCENE, {"scene": text})
    logits = label.from_fields(OBJECT, {"scene": text})
    assert probabilities is not None
    assert logits is not None
    assert probabilities.dtype == logits.dtype == np.float32
    np.testing.assert_array_equal(probabilities, np.eye(365)[expected])
    np.testing.assert_array_equal(softmax(logits), np.eye(1000)[expected])


@pytest.mark.parametrize("text", ["kitchen", "365", "-1", "1.5", "٣"])
def test_what_is_no_class(text: str) -> None:
    with pytest.raises(UserError, match="is no class of 'class_scene'"):
        VectorLabel(value="scene").from_fields(SCENE, {"scene": text})
    with pytest.raises(UserError, match=f"field 'scene' holds '{text}', which `map` does not name"):
        VectorLabel(value="scene", map={0: 0}).from_fields(SCENE, {"scene": text})


def test_empty_fields_are_no_label() -> None:
    assert VectorLabel(value="scene").from_fields(SCENE, {"scene": " "}) is None
    assert VectorLabel(values=("a", "b"), classes=(1, 2)).from_fields(SCENE, {"a": "", "b": ""}) is None
    with pytest.raises(UserError, match="field 'b' holds '', which is no number"):
        VectorLabel(values=("a", "b"), classes=(1, 2)).from_fields(SCENE, {"a": "1", "b": ""})


def test_numbers_of_some_classes() -> None:
    fields = {"p_b": "0.25", "x": "9", "p_a": "0.75"}
    label = VectorLabel(values=("p_*",), classes=(9, 4))
    vector = label.from_fields(SCENE, fields)
    assert vector is not None
    assert (vector[9], vector[4], vector.sum()) == (0.25, 0.75, 1.0)
    logits = VectorLabel(values=("p_*",), classes=(9, 4), given="probabilities").from_fields(OBJECT, fields)
    assert logits is not None
    np.testing.assert_allclose(softmax(logits)[[9, 4]], [0.25, 0.75], atol=1e-6)
    named = VectorLabel(values=("p_a", "p_b"), classes=(9, 4)).from_fields(SCENE, fields)
    assert named is not None
    assert (named[9], named[4]) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"value": "x", "classes": [3, 23, 25]}, "`classes` are those of several numbers"),
        ({"path": "x", "given": "class", "classes": [3, 23, 25]}, "`classes` are those of several numbers"),
        ({"value": "x", "given": "logits"}, "`value` is always the class: leave `given` out"),
        ({"value": "x", "key": "a"}, "`key` names an array in the file at `path`"),
        ({"value": "x", "map": {"1-5": 7, 3: 9}}, "'1-5' and 3 both name 3: give it one class"),
        ({"value": "x", "map": {"1-5": 7, "5-8": 9}}, "'1-5' and '5-8' both name 5"),
    ],
)
def test_rules_that_would_be_ignored_are_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorLabel.model_validate(rule)


def test_files_of_vectors() -> None:
    rng = np.random.default_rng(0)
    probabilities, logits = rng.dirichlet(np.ones(365)), rng.standard_normal(1000)
    label = VectorLabel(path="x")
    np.testing.assert_array_equal(label.from_array(SCENE, probabilities[None]), probabilities.astype(np.float32))
    np.testing.assert_array_equal(label.from_array(OBJECT, logits), logits.astype(np.float32))
    scene_logits = rng.standard_normal(365)
    from_logits = VectorLabel(path="x", given="logits").from_array(SCENE, scene_logits)
    np.testing.assert_allclose(from_logits, softmax(scene_logits.astype(np.float32)), rtol=1e-5)
    one_class = VectorLabel(path="x", given="class").from_array(SCENE, np.array([[8]]))
    np.testing.assert_array_equal(one_class, np.eye(365)[8])


@pytest.mark.parametrize(
    ("rule", "array", "message"),
    [
        ({}, np.zeros(364), "364 numbers, but there are 365 classes"),
        ({}, np.full(365, np.nan), "not finite"),
        ({}, np.zeros(365), "no probabilities"),
        ({}, np.full(365, -1.0), "no probabilities"),
        ({}, np.array(["a"] * 365), "must hold numbers"),
        ({"given": "class"}, np.array([1, 2]), "the number of one class"),
        ({"given": "class"}, np.array([1.5]), "the number of one class"),
        ({"given": "class"}, np.array([365]), "is no class"),
        ({"classes": (1, 2)}, np.ones(3), "3 numbers, but there are 2 classes"),
    ],
)
def test_files_that_hold_no_vector(rule: dict[str, Any], array: NDArray[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VectorLabel(path="x", **rule).from_array(SCENE, array)
