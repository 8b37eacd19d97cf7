"""Shards keep every array, are found only when complete, and say clearly what is wrong with them."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.tasks import TASKS
from data_pipeline.codecs import PNG, encode_label
from data_pipeline.sample import AnyArray, Sample
from data_pipeline.shards import INDEX_FILE, ShardEntry, ShardIndex, ShardWriter, build_index, write_index
from tests.data_pipeline.children import can_mount, run_with_mounts
from tests.data_pipeline.open_files import open_files

SIDE = 8


def make_sample(number: int, tasks: tuple[str, ...] = ("depth_zbuffer", "normal"), side: int = SIDE) -> Sample:
    rng = np.random.default_rng(number)
    labels: dict[str, AnyArray] = {
        "depth_zbuffer": rng.integers(0, 65536, (side, side), dtype=np.uint16),
        "normal": rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
        "class_scene": rng.random(365).astype(np.float32),
    }
    return Sample(
        key=f"house/view_{number}",
        rgb=rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
        labels={task: labels[task] for task in tasks},
        mask_valid=np.where(rng.random((side, side)) < 0.5, 0, 255).astype(np.uint8) if number % 2 else None,
        meta={"number": number},
    )


def write_shard(path: Path, samples: list[Sample]) -> ShardEntry:
    with ShardWriter(path) as writer:
        for sample in samples:
            writer.write(sample)
    return writer.entry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards: three samples with two labels, two samples with one or three."""
    first = write_shard(tmp_path / "a.tar", [make_sample(i) for i in range(3)])
    second = write_shard(
        tmp_path / "b.tar", [make_sample(3, ("normal",)), make_sample(4, ("depth_zbuffer", "normal", "class_scene"))]
    )
    write_index(tmp_path, [second, first])
    return tmp_path


def test_everything_written_is_read_back(folder: Path) -> None:
    index = ShardIndex.load(folder)
    assert (len(index), index.size, index.tasks) == (5, SIDE, ("class_scene", "depth_zbuffer", "normal"))
    assert index.shard_of.tolist() == [0, 0, 0, 1, 1]
    assert index.shard_count == 2
    assert index.file_bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    for number in range(5):
        tasks = ("normal",) if number == 3 else ("depth_zbuffer", "normal") + (("class_scene",) if number == 4 else ())
        sample = make_sample(number, tasks)
        assert index.keys[number] == sample.key
        assert index.meta(number) == {"number": number}
        np.testing.assert_array_equal(index.image(number), sample.rgb)
        expected = np.ones((SIDE, SIDE), bool) if sample.mask_valid is None else sample.mask_valid > 0
        np.testing.assert_array_equal(index.mask_valid(number), expected)
        for task, label in sample.labels.items():
            np.testing.assert_array_equal(index.label(number, TASKS[task]), label)
    index.verify()


def test_available_follows_the_tasks_asked_for(folder: Path) -> None:
    index = ShardIndex.load(folder)
    assert index.available(["normal", "edges", "class_scene"]).tolist() == [
        [True, False, False],
        [True, False, False],
        [True, False, False],
        [True, False, False],
        [True, False, True],
    ]
    with pytest.raises(UserError, match=r"b.tar, sample house/view_3, member depth_zbuffer does not exist"):
        index.label(3, TASKS["depth_zbuffer"])


def test_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    one = write_shard(tmp_path / "one.tar", [make_sample(1), make_sample(2)])
    two = write_shard(tmp_path / "two.tar", [make_sample(1), make_sample(2)])
    assert one.sha256 == two.sha256
    assert one == two.model_copy(update={"file": "one.tar"})
    assert ShardEntry.model_validate_json(one.model_dump_json()) == one


def test_webdataset_reads_the_shards(folder: Path) -> None:
    import webdataset

    found = list(webdataset.WebDataset(str(folder / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [f"house/view_{i}" for i in range(3)]
    assert {"rgb.png", "depth_zbuffer.png", "normal.png", "meta.json"} <= set(found[0])


def test_an_interrupted_shard_leaves_nothing(tmp_path: Path) -> None:
    bad = Sample(key="s", rgb=make_sample(0).rgb, labels={"normal": np.zeros((SIDE, SIDE), np.uint16)})
    with pytest.raises(UserError, match="normal"):
        write_shard(tmp_path / "a.tar", [make_sample(0), bad])
    assert list(tmp_path.iterdir()) == []


SHARDS_ON_FULL_DISKS = """
import subprocess, sys
from pathlib import Path
from data_pipeline.shards import ShardWriter
from tests.data_pipeline.random_source import random_sample

out = Path(sys.argv[1])
for size in range(40, 76, 4):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", out], check=True)
    try:
        with ShardWriter(out / "a.tar") as writer:
            for index in range(8):
                writer.write(random_sample(index))
    except OSError as error:
        print(error.strerror, list(out.iterdir()))
"""


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
def test_a_shard_that_did_not_fit_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    done = run_with_mounts(tmp_path / "script.py", SHARDS_ON_FULL_DISKS, str(tmp_path / "disk"))
    assert done.stdout.splitlines() == ["No space left on device []"] * 9, done.stderr


def test_a_refused_sample_leaves_no_trace(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        with pytest.raises(UserError, match="16 x 8 pixels"):
            writer.write(Sample(key="tall", rgb=np.zeros((16, 8, 3), np.uint8), labels={}))
        writer.write(make_sample(0))
    assert (writer.entry.keys, writer.entry.side) == (("house/view_0",), SIDE)


def test_long_keys_are_kept(tmp_path: Path) -> None:
    key = "/".join(["building" * 20, "view" * 30])
    write_index(tmp_path, [write_shard(tmp_path / "a.tar", [Sample(key=key, rgb=make_sample(0).rgb, labels={})])])
    assert ShardIndex.load(tmp_path).keys == (key,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "may hold letters"),
        ({"rgb": np.zeros((SIDE, SIDE + 1, 3), np.uint8)}, "8 x 9 pixels"),
        ({"labels": {"normal": np.zeros((4, 4, 3), np.uint8)}}, "'normal' is 4 x 4 pixels"),
        ({"labels": {"normal": np.zeros((SIDE, SIDE, 3), np.uint16)}}, "sample s: label 'normal' is uint16"),
        ({"labels": {"depht": np.zeros((SIDE, SIDE), np.uint16)}}, "unknown task 'depht'"),
        ({"mask_valid": np.zeros((4, 4), np.uint8)}, "'mask_valid' is 4 x 4 pixels"),
    ],
)
def test_unfit_samples_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    values = {"key": "s", "rgb": np.zeros((SIDE, SIDE, 3), np.uint8), "labels": {}, **change}
    with pytest.raises(UserError, match=message), ShardWriter(tmp_path / "a.tar") as writer:
        writer.write(Sample(**values))  # type: ignore[arg-type]


def test_reads_work_in_pickled_copies_and_after_close(folder: Path) -> None:
    index = ShardIndex.load(folder)
    expected = index.read(0, "rgb")
    copy = pickle.loads(pickle.dumps(index))
    index.close()
    assert copy.read(0, "rgb") == expected == index.read(0, "rgb")


def test_few_files_stay_open(tmp_path: Path) -> None:
    entries = [write_shard(tmp_path / f"{i:03d}.tar", [make_sample(i, ())]) for i in range(80)]
    write_index(tmp_path, entries)
    index = ShardIndex.load(tmp_path)
    for sample in [*range(80), 0, 79]:
        assert index.meta(sample) == {"number": sample}
    assert 1 <= len(open_files(tmp_path)) <= 64
    index.close()
    assert not open_files(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1024])


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)


def edit_column(folder: Path, change: Callable[[list[int], list[int]], object]) -> None:
    """Change the places of the first shard's images."""
    content = json.loads((folder / INDEX_FILE).read_text())
    rgb = content["shards"][0]["members"]["rgb.png"]
    change(rgb["offset"], rgb["size"])
    (folder / INDEX_FILE).write_text(json.dumps(content))


def edit_index(folder: Path, old: str, new: str) -> None:
    text = (folder / INDEX_FILE).read_text()
    assert old in text
    (folder / INDEX_FILE).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "b.tar").unlink(), r"b.tar is missing"),
        (lambda folder: cut(folder / "b.tar"), r"b.tar has \d+ bytes, but .* truncated"),
        (lambda folder: (folder / INDEX_FILE).unlink(), "tar shards but no index.json: .*`modsquad data index"),
        (lambda folder: (folder / INDEX_FILE).write_text('{"version": 9}'), "not an index .* version"),
        (lambda folder: (folder / INDEX_FILE).write_text("{"), "not an index"),
        (lambda folder: (folder / INDEX_FILE).write_text(""), "not an index"),
        (lambda folder: (folder / INDEX_FILE).write_bytes(b"\xff"), "not an index .*utf-8"),
        (lambda folder: edit_column(folder, lambda offset, size: offset.pop()), r"2 offsets and 3 sizes of rgb.png"),
        (lambda folder: edit_column(folder, lambda offset, size: (offset.append(0), size.append(1))), "for 3 keys"),
        (lambda folder: edit_column(folder, lambda offset, size: size.append(size.pop() + 2**40)), "not an index"),
        (lambda folder: (folder / INDEX_FILE).write_text('{"version": 1, "side": 8, "tasks": []}'), "lists no shards"),
        (lambda folder: edit_index(folder, '"b.tar"', "7"), r"not an index .*file: .*valid string"),
        (lambda folder: edit_index(folder, "]}\n", ""), r"not an index .*shards breaks off"),
        (lambda folder: edit_index(folder, ",\n{", "\n{"), r"not an index .*shards breaks off"),
    ],
)
def test_broken_folders_are_explained(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        ShardIndex.load(folder)


def test_empty_and_absent_folders_say_what_to_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="modsquad data rooms"):
            ShardIndex.load(folder)
        with pytest.raises(UserError, match="no tar shards"):
            build_index(folder)


def test_changed_bytes_are_found_by_checksum_and_change_the_fingerprint(folder: Path) -> None:
    before = ShardIndex.load(folder)
    flip_byte(folder / "a.tar")
    with pytest.raises(UserError, match=r"a.tar does not match its checksum"):
        before.verify()
    write_shard(folder / "a.tar", [make_sample(i + 10) for i in range(3)])
    build_index(folder)
    assert ShardIndex.load(folder).fingerprint != before.fingerprint


def test_a_shard_cut_after_loading_is_found_on_reading(folder: Path) -> None:
    index = ShardIndex.load(folder)
    os.truncate(folder / "b.tar", 1000)
    with pytest.raises(UserError, match=r"b.tar, sample house/view_4, member rgb is cut off"):
        index.read(4, "rgb")


@pytest.mark.parametrize("facts", [b"{", b"\xff", b'["abc"]', b"7"])
def test_damaged_facts_are_named(tmp_path: Path, facts: bytes) -> None:
    _, rgb = PNG.encode(make_sample(0).rgb)
    write_tar(tmp_path / "x.tar", [("k.rgb.png", rgb), ("k.meta.json", facts)])
    build_index(tmp_path)
    with pytest.raises(UserError, match=r"sample k, member meta is not a JSON object"):
        ShardIndex.load(tmp_path).meta(0)


def test_repeated_keys_and_mixed_sizes_are_refused(tmp_path: Path) -> None:
    one = write_shard(tmp_path / "a.tar", [make_sample(0)])
    again = write_shard(tmp_path / "b.tar", [make_sample(0)])
    large = write_shard(tmp_path / "c.tar", [make_sample(1, side=16)])
    with pytest.raises(UserError, match=r"house/view_0 is in a.tar and again in b.tar"):
        write_index(tmp_path, [one, again])
    with pytest.raises(UserError, match=r"8 pixels in a.tar, but 16 in c.tar"):
        write_index(tmp_path, [one, large])


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def foreign_members(count: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(count):
        sample = make_sample(number)
        _, rgb = PNG.encode(sample.rgb)
        _, depth = encode_label(TASKS["depth_zbuffer"], sample.labels["depth_zbuffer"])
        members += [(f"k{number}.RGB.png", rgb), (f"k{number}.depth_zbuffer.png", depth), ("readme", b"hello")]
    return members


def test_a_folder_with_the_name_of_a_shard(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(UserError, match=r"x.tar cannot be read"):
        build_index(tmp_path)


def test_foreign_tars_are_indexed(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", foreign_members(3))
    build_index(tmp_path)
    index = ShardIndex.load(tmp_path)
    assert index.keys == ("k0", "k1", "k2")
    np.testing.assert_array_equal(index.label(2, TASKS["depth_zbuffer"]), make_sample(2).labels["depth_zbuffer"])


def test_foreign_labels_of_another_size_are_named(tmp_path: Path) -> None:
    _, rgb = PNG.encode(make_sample(0).rgb)
    _, depth = encode_label(TASKS["depth_zbuffer"], np.zeros((4, 5), np.uint16))
    write_tar(tmp_path / "x.tar", [("k.rgb.png", rgb), ("k.depth_zbuffer.png", depth)])
    build_index(tmp_path)
    with pytest.raises(UserError, match=r"member depth_zbuffer is 4 x 5 pixels, but the images are 8 x 8"):
        ShardIndex.load(tmp_path).label(0, TASKS["depth_zbuffer"])


def test_no_cut_of_a_foreign_tar_goes_unnoticed(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", foreign_members(2))
    whole = (tmp_path / "x.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in [*range(0, end, 97), end]:
        (tmp_path / "x.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"x.tar"):
            build_index(tmp_path)


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", foreign_members(2))
    data = (tmp_path / "x.tar").read_bytes()
    at = data.index(b"k1.RGB.png")
    (tmp_path / "x.tar").write_bytes(data[:at] + b"?" + data[at + 1 :])
    with pytest.raises(UserError, match="damaged"):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 3, 1, 4], "not next to each other"),
        ([0, 0, 1], "holds 'rgb' twice"),
        ([1, 4], "has no image"),
        ([2], "holds no sample"),
    ],
)
def test_badly_ordered_tars_are_refused(tmp_path: Path, order: list[int], message: str) -> None:
    members = foreign_members(2)
    write_tar(tmp_path / "x.tar", [members[i] for i in order])
    with pytest.raises(UserError, match=message):
        build_index(tmp_path)


def test_index_json_may_be_written_in_any_style(folder: Path) -> None:
    before = ShardIndex.load(folder)
    content = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2))
    after = ShardIndex.load(folder)
    assert (after.fingerprint, after.keys) == (before.fingerprint, before.keys)
    assert after.read(4, "class_scene") == before.read(4, "class_scene")


def test_the_tasks_are_those_that_the_shards_hold(folder: Path) -> None:
    edit_index(folder, '["class_scene",', '["edges",')
    assert ShardIndex.load(folder).tasks == ("class_scene", "depth_zbuffer", "normal")


def test_index_json_names_what_it_holds(folder: Path) -> None:
    content = json.loads((folder / INDEX_FILE).read_text())
    assert (content["version"], content["side"]) == (1, SIDE)
    assert content["tasks"] == ["class_scene", "depth_zbuffer", "normal"]
    depth = content["shards"][1]["members"]["depth_zbuffer.png"]
    assert depth["offset"][0] == -1
    data = (folder / "b.tar").read_bytes()
    assert data[depth["offset"][1] :][: depth["size"][1]] == ShardIndex.load(folder).read(4, "depth_zbuffer")
