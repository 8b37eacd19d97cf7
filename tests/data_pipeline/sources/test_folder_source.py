"""Folders and tables to samples, as descriptions say: which files, which parts, which problems, which names."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.tasks import TASKS
from data_pipeline.index import ShardIndex
from data_pipeline.pack import pack
from data_pipeline.show import load_target
from data_pipeline.sources.folder_files import safe_key
from data_pipeline.sources.folder_source import FolderSource
from tests.data_pipeline.folder_tree import (
    DEPTH,
    SIZE,
    describe,
    image,
    named,
    save,
    three_images,
    write_table,
)


def test_files_are_joined_by_their_fields(tmp_path: Path) -> None:
    found, problems = named(three_images(tmp_path), labels=DEPTH)
    assert list(found) == ["a", "b", "c"]
    assert problems == []
    assert "depth_zbuffer" not in found["b"].labels
    assert found["b"].mask_valid is None
    np.testing.assert_array_equal(found["c"].labels["depth_zbuffer"], np.full((8, 8), 3 * 512))
    np.testing.assert_array_equal(found["a"].rgb, image(1))
    assert found["a"].meta == {"name": "a", "image": "images/a.png", "height": 8, "width": 8}


def test_a_label_may_be_shared_by_a_folder(tmp_path: Path) -> None:
    for scene, frame in (("s", "1"), ("s", "2"), ("t", "1")):
        save(tmp_path / "scenes" / scene / "rgb" / f"{frame}.png", image(1))
    for scene, kind in (("s", 3), ("t", 7)):
        save(tmp_path / "scenes" / scene / "class.npy", np.eye(365)[kind])
    found, problems = named(
        tmp_path,
        rgb="scenes/{scene}/rgb/{frame}.png",
        labels={"class_scene": "scenes/{scene}/class.npy", "class_object": {"value": "scene", "map": {"s": 1, "t": 2}}},
    )
    assert {name: int(sample.labels["class_scene"].argmax()) for name, sample in found.items()} == {
        "s/1": 3, "s/2": 3, "t/1": 7,
    }  # fmt: skip
    assert [int(sample.labels["class_object"].argmax()) for sample in found.values()] == [1, 1, 2]
    assert problems == []


def test_one_folder_may_hold_images_and_labels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", image(5))
    save(tmp_path / "a_depth.png", np.full((8, 8), 512, np.uint16))
    label = {"depth_zbuffer": {"path": "{key}_depth.png", "unit_metres": 1 / 512}}
    found, problems = named(tmp_path, rgb="{key}.png", labels=label)
    assert list(found) == ["a"]
    np.testing.assert_array_equal(found["a"].labels["depth_zbuffer"], 512)
    assert problems == []


def test_what_belongs_together_in_no_way_is_listed(tmp_path: Path) -> None:
    folder = three_images(tmp_path)
    save(folder / "depth" / "x.png", np.zeros((8, 8), np.uint16))
    save(folder / "images" / "b.jpg", image(9))
    (folder / "images" / ".hidden.png").touch()
    found, problems = named(folder, rgb="images/{key}.*", labels=DEPTH)
    assert list(found) == ["a", "b", "c"]
    assert {(problem.key, problem.task, problem.reason) for problem in problems} == {
        ("b", "", "given twice; used is images/b.jpg"),
        ("x", "depth_zbuffer", "belongs to no image"),
    }


def test_odd_files_are_listed_and_the_rest_is_kept(tmp_path: Path) -> None:
    folder = three_images(tmp_path)
    (folder / "images" / "b.png").write_bytes(b"")
    (folder / "depth" / "a.png").write_bytes((folder / "depth" / "a.png").read_bytes()[:50])
    save(folder / "depth" / "c.png", np.full((8, 16), 1, np.uint16))
    (folder / "images" / "d.png").mkdir()
    (folder / "images" / "e.png").symlink_to(folder / "nowhere.png")
    found, problems = named(folder, labels=DEPTH)
    assert list(found) == ["a", "c"]
    assert not any(sample.labels for sample in found.values())
    reasons = {(problem.key, problem.task): problem.reason for problem in problems}
    assert "damaged" in reasons["a", "depth_zbuffer"]
    assert reasons["b", ""] == "the file is empty"
    assert "(8, 16) pixels, which is no scaling of the image's (8, 8)" in reasons["c", "depth_zbuffer"]
    assert reasons["e", ""] == "there is no such file"
    with pytest.raises(UserError, match=r"sample a, depth_zbuffer, .*a\.png: the file is damaged"):
        pack(FolderSource(describe(folder, labels=DEPTH), SIZE), tmp_path / "out", strict=True)


def test_centre_and_stretch(tmp_path: Path) -> None:
    ids = np.repeat(np.arange(16, dtype=np.uint8), 2)[None].repeat(16, 0)
    save(tmp_path / "images" / "a.png", np.repeat(ids[:, :, None], 3, axis=2))
    save(tmp_path / "ids" / "a.png", ids)
    labels = {"semseg": "ids/{key}.png"}
    centred = named(tmp_path, labels=labels)[0]["a"]
    np.testing.assert_array_equal(centred.labels["semseg"], np.arange(4, 12)[None].repeat(8, 0))
    stretched = named(tmp_path, labels=labels, fit="stretch")[0]["a"]
    np.testing.assert_array_equal(stretched.labels["semseg"], np.arange(1, 16, 2)[None].repeat(8, 0))
    assert abs(int(stretched.rgb[4, 0, 0]) - 0) <= 1
    assert abs(int(stretched.rgb[4, 7, 0]) - 15) <= 1


def test_geometry_is_masked_where_it_is_unknown(tmp_path: Path) -> None:
    folder = tmp_path
    save(folder / "images" / "a.png", image(1))
    depth = np.full((8, 8), 2.0, np.float32)
    depth[0] = np.nan
    save(folder / "depth" / "a.npy", depth)
    normal = np.zeros((8, 8, 3), np.float32)
    normal[:, 1:, 2] = -1.0
    save(folder / "normal" / "a.npy", normal)
    save(folder / "mask" / "a.png", np.eye(8, dtype=np.uint8))
    depth_only = {"depth_zbuffer": "depth/{key}.npy"}
    both = {**depth_only, "normal": "normal/{key}.npy"}
    by_depth, by_both = (named(folder, labels=labels)[0]["a"].mask_valid for labels in (depth_only, both))
    assert by_depth is not None
    assert by_both is not None
    np.testing.assert_array_equal(by_depth == 255, np.isfinite(depth))
    np.testing.assert_array_equal(by_both == 255, np.isfinite(depth) & (normal[:, :, 2] < 0))
    given = named(folder, labels=depth_only, mask_valid="mask/{key}.png")[0]["a"].mask_valid
    inverted = named(folder, labels=depth_only, mask_valid={"path": "mask/{key}.png", "positive": [0]})[0]["a"]
    np.testing.assert_array_equal(given, np.eye(8) * 255)
    np.testing.assert_array_equal(inverted.mask_valid, (1 - np.eye(8)) * 255)


def test_a_label_that_is_unknown_everywhere_is_none(tmp_path: Path) -> None:
    folder = three_images(tmp_path)
    save(folder / "depth" / "a.png", np.zeros((8, 8), np.uint16))
    found, problems = named(folder, labels=DEPTH)
    assert found["a"].labels == {}
    assert problems == []


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_normals_that_are_unknown_everywhere_leave_the_depth_alone(tmp_path: Path, value: float) -> None:
    folder = three_images(tmp_path)
    normals = np.full((8, 10, 3), value, np.float32)
    normals[:, [0, -1]] = [0.0, 0.0, 1.0]  # At the sides, which the square leaves out.
    save(folder / "images" / "a.png", image(1, width=10))
    save(folder / "depth" / "a.png", np.full((8, 10), 1000, np.uint16))
    save(folder / "normal" / "a.npy", normals)
    labels = {**DEPTH, "normal": "normal/{key}.npy"}
    assert pack(FolderSource(describe(folder, labels=labels), SIZE), tmp_path / "out").problems == ()
    index = ShardIndex.load(tmp_path / "out")
    a = index.keys.index("a")
    assert index.available(["depth_zbuffer", "normal"])[a].tolist() == [True, False]
    assert load_target(index, a, TASKS["depth_zbuffer"]).mask.all()


def test_labels_that_the_mask_excludes_everywhere_are_none(tmp_path: Path) -> None:
    folder = three_images(tmp_path)
    save(folder / "mask" / "a.png", np.zeros((8, 8), np.uint8))
    save(folder / "ids" / "a.png", np.zeros((8, 8), np.uint8))
    labels = {**DEPTH, "semseg": "ids/{key}.png"}
    found, problems = named(folder, labels=labels, mask_valid="mask/{key}.png")
    assert list(found["a"].labels) == ["semseg"]
    assert list(found["c"].labels) == ["depth_zbuffer"]
    assert problems == []


LINES = """id,photo,depth,scene,part,p_bed,p_bath
1,images/a.png,depth/a.png,kitchen,train,0.25,0.75
2,images/b.png,,bath room,val,,
3,"images/c.png",depth/absent.png,,train,x,1
4,images/absent.png,depth/a.png,kitchen,train,1,0
5,,,,,,
6,images/a.png,,kitchen
7,../secret.png,/etc/passwd,kitchen,val,1,0
8,images/c.png,../up.png,attic,val,0,2
"""
TABLE_LABELS = {
    "depth_zbuffer": {"path": "{depth}", "unit_metres": 0.001},
    "class_scene": {"value": "scene", "map": {"kitchen": 200, "bath room": 12}},
    "class_object": {"values": "p_*", "given": "probabilities", "classes": [5, 700]},
}


@pytest.mark.parametrize(
    ("change", "encoding"),
    [
        (str, "utf-8"),
        (lambda text: text.replace("\n", "\r"), "utf-8-sig"),
        (lambda text: text.replace("\n", "\r\n"), "utf-8"),
    ],
)
def test_a_table_names_files_and_holds_classes(tmp_path: Path, change: Any, encoding: str) -> None:
    table = write_table(three_images(tmp_path), change(LINES), encoding=encoding)
    found, problems = named(tmp_path, table=table, rgb="{photo}", name="view {id}", labels=TABLE_LABELS)
    assert list(found) == ["view 1", "view 2", "view 3", "view 8"]
    first, second = found["view 1"], found["view 2"]
    np.testing.assert_array_equal(first.labels["depth_zbuffer"], 512)
    assert first.labels["class_scene"][200] == second.labels["class_scene"][12] == 1.0
    assert sorted(second.labels) == ["class_scene"]
    softmax = np.exp(first.labels["class_object"].astype(np.float64))
    np.testing.assert_allclose(softmax[[5, 700]] / softmax.sum(), [0.25, 0.75], atol=1e-6)
    assert softmax.sum() == pytest.approx(1.0)
    reasons = {(problem.key, problem.task): problem.reason for problem in problems}
    keys = {name: found[name].key for name in found}
    absent, secret = safe_key("view 4"), safe_key("view 7")
    place = str(tmp_path / "table.csv")
    assert reasons == {
        (keys["view 3"], "depth_zbuffer"): "there is no such file",
        (keys["view 3"], "class_object"): "field 'p_bed' holds 'x', which is no number",
        (absent, ""): "there is no such file",
        (f"{place}, line 6", ""): "the line names no image",
        (f"{place}, line 7", ""): "the line has 4 cells, the header 7",
        (secret, ""): "the path leads out of the root by '..'",
        (secret, "depth_zbuffer"): "the path is absolute",
        (keys["view 8"], "depth_zbuffer"): "the path leads out of the root by '..'",
        (keys["view 8"], "class_scene"): "field 'scene' holds 'attic', which `map` does not name: add it",
    }


def test_names_in_a_table_are_those_of_the_images(tmp_path: Path) -> None:
    three_images(tmp_path)
    table = write_table(tmp_path, "image\timages\nimages/a.png\tx\nimages/c.png\ty\nimages/a.png\tz\n", "t.tsv")
    found, problems = named(tmp_path, table=table, rgb="{image}", labels={"depth_zbuffer": "depth/{images}.png"})
    assert {name: sample.key for name, sample in found.items()} == {"images/a": "images/a", "images/c": "images/c"}
    assert [problem.reason for problem in problems if not problem.task] == ["an earlier line has the same name"]


def test_other_delimiters_and_broken_tables(tmp_path: Path) -> None:
    three_images(tmp_path)
    labels = {"depth_zbuffer": "depth/{key}.png"}
    write_table(tmp_path, "key;note\na;x,y\n")
    assert list(named(tmp_path, table="table.csv", delimiter=";", labels=labels)[0]) == ["images/a"]
    for text, message in (
        ("key,key\na,b\n", "column 'key' is there twice"),
        ("kez\na\n", "rgb: there is no field 'key', did you mean 'kez'?"),
        ("", "rgb: there is no field 'key' Known: none"),
        ('key\n"a\n', "line 2: unexpected end of data"),
        ("key,x\n,1\n", "the table has no line with an image: sample .*, line 2"),
        ("key,x\n", "the table has no line with an image"),
    ):
        write_table(tmp_path, text)
        with pytest.raises(UserError, match=message):
            named(tmp_path, table="table.csv", labels=labels)
    (tmp_path / "table.csv").write_bytes(b"key\n\xff\n")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        named(tmp_path, table="table.csv", labels=labels)
    with pytest.raises(UserError, match=r"table .*absent\.csv cannot be read: No such file"):
        named(tmp_path, table="absent.csv", labels=labels)


def test_names_of_any_kind_become_keys_that_differ(tmp_path: Path) -> None:
    names = ["Straße 7", "Strasse 7", "a b", "a-b", "a.b", "日本", "💡", "é", "e\u0301", "-", "[x]", "%2F"]
    for number, name in enumerate(names):
        save(tmp_path / "images" / f"{name}.png", image(number))
    (tmp_path / os.fsdecode(b"images/\xff\xfe.png")).write_bytes((tmp_path / "images" / "a b.png").read_bytes())
    description = describe(tmp_path, labels={"class_scene": {"value": "key", "map": {"a-b": 3}}})
    report = pack(FolderSource(description, SIZE), tmp_path / "out")
    index = ShardIndex.load(tmp_path / "out")
    kept = [index.meta(number)["name"] for number in range(len(index))]
    assert sorted(kept) == sorted([*names, "\\xff\\xfe"])
    assert "a-b" in index.keys
    assert all(re.fullmatch("[A-Za-z0-9_-]+", key) for key in index.keys)
    assert Counter(problem.task for problem in report.problems) == {"class_scene": len(names)}
    lines = (tmp_path / "out" / "problems.jsonl").read_text(encoding="ascii").splitlines()
    assert {json.loads(line)["key"] for line in lines} == set(index.keys) - {"a-b"}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=2, unique=True))
def test_keys_are_safe_and_tell_names_apart(names: list[str]) -> None:
    keys = [safe_key(name) for name in names]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*", key) for key in keys)
    assert len(set(keys)) == len(names)


def test_patterns_that_fit_nothing_say_what_is_there(tmp_path: Path) -> None:
    folder = three_images(tmp_path)
    with pytest.raises(UserError, match=r"own\.yaml: rgb: no file .* fits 'photos/\{key\}\.png': there is no folder"):
        named(folder, rgb="photos/{key}.png", labels=DEPTH)
    with pytest.raises(UserError, match=r"labels\.depth_zbuffer\.path: no file .*: .*depth holds a\.png, c\.png"):
        named(folder, labels={"depth_zbuffer": "depth/{key}.npy"})
    with pytest.raises(UserError, match=r"there is no folder .*away: set `root`"):
        named(folder, root="away", labels=DEPTH)
    with pytest.raises(UserError, match=r"labels\.depth_zbuffer\.path: there is no field 'kez', did you mean 'key'\?"):
        named(folder, labels={"depth_zbuffer": "depth/{kez}.png"})
    with pytest.raises(UserError, match="size 0"):
        FolderSource(describe(folder, labels=DEPTH), 0)


def test_the_root_may_be_anywhere(tmp_path: Path) -> None:
    three_images(tmp_path / "data")
    (tmp_path / "descriptions").mkdir()
    for root in ("../data", str(tmp_path / "data")):
        assert len(named(tmp_path / "descriptions", root=root, labels=DEPTH)[0]) == 3


def test_another_description_is_another_source(tmp_path: Path) -> None:
    folder = three_images(tmp_path)
    values: list[dict[str, Any]] = [
        {"labels": DEPTH},
        {"labels": {"depth_zbuffer": {"path": "depth/{key}.png", "unit_metres": 0.002}}},
        {"labels": DEPTH, "fit": "stretch"},
    ]
    names = [FolderSource(describe(folder, **value), SIZE).name for value in values]
    names.append(FolderSource(describe(folder, labels=DEPTH), SIZE + 1).name)
    assert len(set(names)) == 4
    assert FolderSource(describe(folder, labels=DEPTH), SIZE).name == names[0]
