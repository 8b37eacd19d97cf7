"""What `make_room` promises: the same bytes for the same arguments, stored encodings, variety, clear errors."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from configs.errors import UserError
from configs.tasks import TASKS, VOC_CLASSES
from data_pipeline.rooms.catalogue import OBJECT_CLASSES, PLACES_INDEX
from data_pipeline.rooms.generate import make_room
from data_pipeline.sample import Sample


def fingerprint(sample: Sample) -> str:
    digest = hashlib.sha256(sample.rgb.tobytes())
    for name in sorted(sample.labels):
        digest.update(name.encode() + sample.labels[name].tobytes())
    assert sample.mask_valid is not None
    digest.update(sample.mask_valid.tobytes() + repr(sorted(sample.meta.items())).encode())
    return digest.hexdigest()


def test_another_process_makes_the_same_bytes() -> None:
    program = (
        "from data_pipeline.rooms.generate import make_room\n"
        "from test_rooms_generate import fingerprint\n"
        "make_room(5, 9, 32)\n"  # what a process made before must not matter
        "print(fingerprint(make_room(5, 2, 48)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()])}
    environment["PYTHONHASHSEED"] = "123"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    assert run.stdout.strip() == fingerprint(make_room(5, 2, 48))


def test_seed_and_index_change_the_room() -> None:
    prints = {fingerprint(make_room(seed, index, 32)) for seed in (0, 1) for index in (0, 1)}
    assert len(prints) == 4


def test_size_changes_the_resolution_but_not_the_room() -> None:
    small, large = (make_room(4, 4, size, ["depth_zbuffer"]) for size in (32, 128))
    assert small.meta["scene_type"] == large.meta["scene_type"]
    middle = large.labels["depth_zbuffer"].reshape(32, 4, 32, 4)[:, 1:3, :, 1:3].astype(float).mean((1, 3))
    close = np.abs(small.labels["depth_zbuffer"] - middle) < 0.05 * middle
    assert close.mean() > 0.8


@pytest.mark.parametrize("task", list(TASKS))
def test_labels_have_their_stored_encoding(rooms: list[Sample], task: str) -> None:
    spec = TASKS[task]
    for sample in rooms:
        label = sample.labels[task]
        height, width = sample.rgb.shape[:2]
        plane = (height, width) if spec.encoding.channels == 1 else (height, width, spec.encoding.channels)
        assert label.shape == (plane if spec.dense else (spec.encoding.channels,))
        assert label.dtype == spec.encoding.dtype
        if spec.target == "class_ids":
            assert set(np.unique(label)) <= {*range(spec.channels), spec.encoding.invalid}
        if spec.target == "binary":
            assert set(np.unique(label)) <= {0, 255}
        if spec.dense and spec.target not in ("class_ids", "binary"):
            assert label.min() < label.max()


def test_images_and_masks(rooms: list[Sample]) -> None:
    for sample in rooms:
        assert sample.rgb.shape == (64, 64, 3)
        assert sample.rgb.dtype == np.uint8
        assert sample.mask_valid is not None
        assert set(np.unique(sample.mask_valid)) <= {0, 255}
        assert 20 < sample.rgb.mean() < 240
        assert sample.rgb.std() > 10


def test_class_vectors(many_rooms: list[Sample]) -> None:
    for sample in many_rooms:
        scene, logits = sample.labels["class_scene"], sample.labels["class_object"]
        assert scene.sum() == pytest.approx(1, abs=1e-5)
        assert scene.argmax() == PLACES_INDEX[sample.meta["scene_type"]]
        assert np.isfinite(logits).all()
        known = {cls.imagenet for cls in OBJECT_CLASSES}
        assert int(logits.argmax()) in known
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        assert sum(p for i, p in enumerate(probability) if i in known) > 0.9


def test_every_scene_type_occurs(many_rooms: list[Sample]) -> None:
    assert {sample.meta["scene_type"] for sample in many_rooms} == set(PLACES_INDEX)


def test_most_voc_classes_occur(many_rooms: list[Sample]) -> None:
    seen = {int(value) for sample in many_rooms for value in np.unique(sample.labels["semseg"])}
    missing = [name for index, name in enumerate(VOC_CLASSES) if index not in seen]
    assert len(missing) <= 2, missing


def test_parts_and_people_agree(many_rooms: list[Sample]) -> None:
    person = VOC_CLASSES.index("person")
    with_people = 0
    for sample in many_rooms:
        parts, is_person = sample.labels["human_parts"], sample.labels["semseg"] == person
        if is_person.any():
            with_people += 1
            assert np.array_equal(parts > 0, is_person)
        else:
            assert (parts == 255).all()
    assert with_people > 12
    assert {int(v) for sample in many_rooms for v in np.unique(sample.labels["human_parts"])} == {*range(7), 255}


def test_only_the_tasks_asked_for() -> None:
    sample = make_room(0, 1, 32, ["normal", "edges"])
    assert list(sample.labels) == ["normal", "edges"]
    assert sample.key == "room_000001"
    everything = make_room(0, 1, 32)
    assert list(everything.labels) == list(TASKS)
    assert np.array_equal(sample.labels["normal"], everything.labels["normal"])


@pytest.mark.parametrize("size", [31, 513, 0, -64])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(UserError, match=f"not {size}"):
        make_room(0, 0, size)


def test_bad_seed_index_and_task() -> None:
    with pytest.raises(UserError, match="seed -1"):
        make_room(-1, 0, 32)
    with pytest.raises(UserError, match="index -2"):
        make_room(0, -2, 32)
    with pytest.raises(UserError, match="depth_zbuffer"):
        make_room(0, 0, 32, ["depth_zbufer"])


@pytest.mark.parametrize("size", [32, 45, 100])
def test_odd_sizes(size: int) -> None:
    sample = make_room(2, 0, size)
    assert sample.rgb.shape == (size, size, 3)
    assert sample.labels["normal"].shape == (size, size, 3)
