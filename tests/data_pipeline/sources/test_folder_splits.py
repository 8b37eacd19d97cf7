"""Which samples of a described folder or table belong to a part."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.errors import UserError
from data_pipeline.check import check_shards
from data_pipeline.pack import pack
from data_pipeline.sources.folder_source import FolderSource
from tests.data_pipeline.folder_tree import DEPTH, SIZE, describe, image, named, save, three_images, write_table


def many(folder: Path, count: int = 60) -> Path:
    for number in range(count):
        save(folder / "images" / f"{number % 5}" / f"{number}.png", image(number))
    return folder


MANY = {"rgb": "images/{scene}/{key}.png", "labels": {"class_scene": {"value": "scene"}}}


def test_fractions_are_stable_and_cover_all(tmp_path: Path) -> None:
    rule = {"split": {"fractions": {"val": 0.25, "test": 0.1}}, **MANY}
    many(tmp_path)
    parts = {part: set(named(tmp_path, part, **rule)[0]) for part in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 60
    assert 5 <= len(parts["val"]) <= 25
    many(tmp_path, 90)
    for part, before in parts.items():
        assert before <= set(named(tmp_path, part, **rule)[0])
    source = FolderSource(describe(tmp_path, **rule), SIZE, "val")
    assert re.fullmatch(r"part val of 90 samples: \d+ test, \d+ train, \d+ val", *source.facts)


def test_scenes_stay_together(tmp_path: Path) -> None:
    rule = {"split": {"fractions": {"val": 0.4}, "by": "scene"}, **MANY}
    parts = [{name.split("/")[0] for name in named(many(tmp_path), part, **rule)[0]} for part in ("train", "val")]
    assert parts[0].isdisjoint(parts[1])
    assert len(parts[0] | parts[1]) == 5


def test_a_field_or_a_list_may_say_the_part(tmp_path: Path) -> None:
    folder = three_images(tmp_path)
    table = write_table(folder, "key,part\na,train\nb,val\nc,train\n")
    rule: Mapping[str, Any] = {"table": table, "split": {"field": "part"}, "labels": DEPTH}
    assert list(named(folder, "train", **rule)[0]) == ["images/a", "images/c"]
    with pytest.raises(UserError, match="no sample is of part 'test': there are train, val"):
        named(folder, "test", **rule)
    (folder / "mine.txt").write_text("c\nimages/a.png\nz\nc\n\n", encoding="utf-8-sig")
    (folder / "empty.txt").write_text("z\n")
    lists = {"split": {"lists": {"val": "mine.txt", "none": "empty.txt", "absent": "absent.txt"}}, "labels": DEPTH}
    found, problems = named(folder, "val", **lists)
    assert list(found) == ["a", "c"]
    assert [(problem.key, problem.reason[:20]) for problem in problems] == [
        ("z", "the list names it, b"),
        ("c", "the list names it tw"),
    ]
    for part, message in (("none", "names none of the 3"), ("absent", "cannot be read"), ("train", "no list for part")):
        with pytest.raises(UserError, match=message):
            named(folder, part, **lists)


def test_lists_and_parts_whose_bytes_are_no_utf_8(tmp_path: Path) -> None:
    folder = three_images(tmp_path)
    lists = {"split": {"lists": {"val": "val.txt", "none": "none.txt"}}, "labels": DEPTH}
    (folder / "val.txt").write_bytes("a\nMüller\n".encode("latin-1"))
    (folder / "none.txt").write_text("z\n")
    scene = os.fsdecode("Küche".encode("latin-1"))
    save(folder / "scenes" / scene / "1.png", image(1))
    label = {"class_scene": {"value": "scene", "map": {"kitchen": 203}}}
    fields = {"rgb": "scenes/{scene}/*.png", "labels": label, "split": {"field": "scene"}}
    for rule, part, problem in ((lists, "val", "M\\xfcller"), (fields, scene, "K\\xfcche")):
        source = FolderSource(describe(folder, **rule), SIZE, part)
        (found,) = pack(source, folder / part, facts=source.facts).problems
        assert problem in str(found)
        Console(file=(folder / "shown.txt").open("w", encoding="utf-8")).print(check_shards(folder / part).table())
    (folder / "images").rename(folder / "photos")
    save(folder / "images" / f"{scene}.png", image(1))
    for rule, part in ((lists, "none"), (fields, "val")):
        with pytest.raises(UserError, match=r"K\\xfcche"):
            FolderSource(describe(folder, **rule), SIZE, part)


def test_a_part_is_asked_for_where_there_are_parts(tmp_path: Path) -> None:
    folder = three_images(tmp_path)
    with pytest.raises(UserError, match="say which part to take, such as --split train"):
        named(folder, labels=DEPTH, split={"fractions": {"val": 0.5}})
    with pytest.raises(UserError, match="the samples are not parted, so there is no 'val'"):
        named(folder, "val", labels=DEPTH)
