"""Packing: the same bytes for any number of processes, resumable after a kill, nothing lost in silence."""

import errno
import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from configs.errors import UserError
from configs.tasks import TASKS, resolve_tasks
from data_pipeline.check import check_shards
from data_pipeline.codecs import ImageCodec
from data_pipeline.index import ShardIndex
from data_pipeline.pack import pack
from data_pipeline.planning.plan import Slot
from data_pipeline.reading import read_batch
from data_pipeline.shards import build_index
from data_pipeline.show import contact_sheet
from data_pipeline.source import Problem, Source, read_problems
from data_pipeline.sources.folder_source import FolderSource
from data_pipeline.sources.pascal_context import PascalContextSource
from data_pipeline.sources.taskonomy import TaskonomySource
from tests.data_pipeline.children import await_no_process, can_mount, run_with_mounts, start_script
from tests.data_pipeline.random_source import FaultySource, FullDiskSource, LostSource, RandomSource, random_sample


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_what_is_packed_reads_back(tmp_path: Path) -> None:
    progress: list[int] = []
    report = pack(RandomSource(10), tmp_path / "new" / "out", samples_per_shard=4, on_progress=progress.append)
    assert (report.samples, report.shards, report.problems) == (10, 3, ())
    assert progress == list(range(1, 11))
    index = ShardIndex.load(tmp_path / "new" / "out")
    assert sorted(np.bincount(index.shard_of)) == [3, 3, 4]
    for number, key in enumerate(index.keys):
        sample = random_sample(int(key[-4:]))
        np.testing.assert_array_equal(index.image(number), sample.rgb)
        for name, label in sample.labels.items():
            np.testing.assert_array_equal(index.label(number, TASKS[name]), label)
        np.testing.assert_array_equal(index.mask_valid(number), sample.mask_valid == 255)
        assert index.meta(number) == sample.meta
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == [
        "index.json", "pack.json", "problems.jsonl", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar",
    ]  # fmt: skip


def test_byte_planes_hold_the_same_labels_as_png(tmp_path: Path) -> None:
    pack(RandomSource(5), tmp_path / "png")
    pack(RandomSource(5), tmp_path / "zstd", label_codec="zstd")
    png, zstd = (ShardIndex.load(tmp_path / name) for name in ("png", "zstd"))
    for member, suffix in (("depth_zbuffer", "plz"), ("normal", "plz"), ("mask_valid", "plz"), ("class_scene", "npy")):
        assert zstd.suffix(0, member) == suffix
    slots = [Slot(sample, (0, 1, 2), 0) for sample in range(5)]
    specs = [TASKS[name] for name in ("depth_zbuffer", "normal", "class_scene")]
    batches = [read_batch(index, specs, slots, np.full(3, 5), None) for index in (png, zstd)]
    for name in ("depth_zbuffer", "normal", "class_scene"):
        assert batches[0].labels[name].equal(batches[1].labels[name])
    assert batches[0].mask_valid.equal(batches[1].mask_valid)
    assert not batches[0].mask_valid.all()
    for before, after in zip(check_shards(tmp_path / "png").tasks, check_shards(tmp_path / "zstd").tasks, strict=True):
        assert (after.task, after.labels, after.known) == (before.task, before.labels, before.known)
        assert after.mean == pytest.approx(before.mean, rel=1e-5)
    for name, index in (("png", png), ("zstd", zstd)):
        contact_sheet(index, specs, 3, tmp_path / f"{name}.png")
    assert (tmp_path / "png.png").read_bytes() == (tmp_path / "zstd.png").read_bytes()


def test_images_as_jpeg_and_webp(tmp_path: Path) -> None:
    for image_format, suffix in (("jpeg", "jpg"), ("webp", "webp")):
        codec = ImageCodec(image_format, 100)
        pack(RandomSource(3), tmp_path / suffix, image_codec=codec)
        pack(RandomSource(3), tmp_path / suffix, image_codec=codec)
        index = ShardIndex.load(tmp_path / suffix)
        assert index.suffix(0, "rgb") == suffix
        for number, key in enumerate(index.keys):
            difference = np.abs(index.image(number).astype(int) - random_sample(int(key[-4:])).rgb)
            assert difference.max() <= (0 if image_format == "webp" else 5)
        assert check_shards(tmp_path / suffix).samples == 3
    with pytest.raises(UserError, match=r'"image_codec": "webp-lossless".* not of .*"image_codec": "webp-99"'):
        pack(RandomSource(3), tmp_path / "webp", image_codec=ImageCodec("webp", 99))


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    progress: list[int] = []
    pack(FaultySource(11), tmp_path / "one", samples_per_shard=2)
    pack(FaultySource(11), tmp_path / "three", workers=3, samples_per_shard=2, on_progress=progress.append)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    assert progress == list(range(1, 12))


def folder_source(root: Path, count: int) -> FolderSource:
    for number in range(count):
        touch(root / "images" / f"{100 + number}.png")
        touch(root / "ids" / f"{100 + number}.png")
    (root / "own.yaml").write_text("rgb: images/{key}.png\nlabels:\n  semseg: ids/{key}.png\n")
    return FolderSource(root / "own.yaml", 8)


def taskonomy_source(root: Path, count: int) -> TaskonomySource:
    for number in range(count):
        for domain in ("rgb", "normal"):
            touch(root / domain / "b" / f"point_{100 + number}_view_0_domain_{domain}.png")
    return TaskonomySource(root, 8, resolve_tasks(["normal"]))


def pascal_context_source(root: Path, count: int) -> PascalContextSource:
    names = [f"{100 + number}" for number in range(count)]
    for name in names:
        touch(root / "JPEGImages" / f"{name}.jpg")
        touch(root / "sal_distill" / f"{name}.png")
    touch(root / "ImageSets" / "Context" / "val.txt").write_text("\n".join(names))
    return PascalContextSource(root, "val", 8, resolve_tasks(["saliency"]))


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize("make", [folder_source, taskonomy_source, pascal_context_source])
def test_what_processes_are_sent_does_not_grow_with_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, int], Source]
) -> None:
    sent: list[list[int]] = []

    def measure(task: Any, items: Iterable[Any], workers: int, on_step: Callable[[], None]) -> None:
        sent.append([len(pickle.dumps(each)) for each in (task, *items)])
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.pack.run_in_processes", measure)
    for root, count in ((tmp_path / "a", 4), (tmp_path / "b", 64)):
        with pytest.raises(KeyboardInterrupt):
            pack(make(root, count), root / "out", workers=2, samples_per_shard=4)
    few, many = sent
    assert (len(few), len(many)) == (2, 17)
    assert few[0] == many[0]
    assert max(many[1:]) <= few[1] + 16  # Numbers grow.


def test_problems_are_listed_and_the_rest_is_kept(tmp_path: Path) -> None:
    report = pack(FaultySource(7), tmp_path, samples_per_shard=3)
    assert report.samples == 5
    found = {(problem.key, problem.task): problem for problem in report.problems}
    assert set(found) == {
        ("view_0001", "depth_zbuffer"),
        ("view_0002", "normal"),
        ("random-7[3]", ""),
        ("view_0004", "normal"),
        ("bad key!", ""),
    }
    assert "uint8" in found["view_0001", "depth_zbuffer"].reason
    assert found["view_0002", "normal"] == Problem("view_0002", "normal", "the file is empty", "somewhere.png")
    assert found["random-7[3]", ""].reason == "the camera is inside a wall"
    lines = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [problem.key for problem in report.problems]
    index = ShardIndex.load(tmp_path)
    available = dict(zip(index.keys, index.available(["depth_zbuffer", "normal", "class_scene"]).tolist(), strict=True))
    assert available == {
        "view_0000": [True, True, True],
        "view_0001": [False, True, True],
        "view_0002": [True, False, True],
        "view_0004": [True, False, True],
        "view_0006": [True, True, True],
    }


def test_strict_stops_at_a_problem(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"view_0001.*depth_zbuffer"):
        pack(FaultySource(2), tmp_path, samples_per_shard=2, strict=True)
    assert not (tmp_path / "index.json").exists()


def test_strict_is_not_content_with_what_an_earlier_packing_left_out(tmp_path: Path) -> None:
    pack(FaultySource(2), tmp_path)
    with pytest.raises(UserError, match=r"view_0001.*depth_zbuffer"):
        pack(FaultySource(2), tmp_path, strict=True)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the folder .*file"):
        pack(RandomSource(1), tmp_path / "file")


def test_a_shard_without_usable_samples_is_left_out(tmp_path: Path) -> None:
    report = pack(LostSource(6, first_lost=2), tmp_path, samples_per_shard=2)
    assert (report.samples, report.shards, len(report.problems)) == (2, 1, 4)
    assert len(list(tmp_path.glob("*.tar"))) == 1


def test_a_source_without_usable_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no usable sample.*inside a wall"):
        pack(LostSource(3), tmp_path)
    with pytest.raises(UserError, match="no samples"):
        pack(RandomSource(0), tmp_path)


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    first = pack(FaultySource(5), tmp_path, samples_per_shard=2)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert pack(FaultySource(5), tmp_path, samples_per_shard=2) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_another_packing_or_foreign_shards_are_not_mixed(tmp_path: Path) -> None:
    pack(RandomSource(5), tmp_path / "a")
    with pytest.raises(UserError, match=r"random-5.*random-6"):
        pack(RandomSource(6), tmp_path / "a")
    with pytest.raises(UserError, match=r'"png".* not of .*"zstd"'):
        pack(RandomSource(5), tmp_path / "a", label_codec="zstd")
    with pytest.raises(UserError, match=r'"image_codec": "png".* not of .*"image_codec": "jpeg-90"'):
        pack(RandomSource(5), tmp_path / "a", image_codec=ImageCodec("jpeg", 90))
    (tmp_path / "a" / "pack.json").write_text("?")
    with pytest.raises(UserError, match=r"holds a packing of \?, not of .*random-5"):
        pack(RandomSource(5), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "photos.tar").touch()
    with pytest.raises(UserError, match="not packed here"):
        pack(RandomSource(5), tmp_path / "b")


def test_two_packings_of_one_folder_exclude_each_other(tmp_path: Path) -> None:
    def intrude(done: int) -> None:
        with pytest.raises(UserError, match="another process is packing"):
            pack(RandomSource(2), tmp_path)

    pack(RandomSource(2), tmp_path, on_progress=intrude)
    assert len(ShardIndex.load(tmp_path)) == 2


@contextmanager
def no_locks() -> Iterator[None]:
    """A file system without locks, which other nodes share."""
    with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks available")):
        yield


def test_without_locks_a_second_claim_does_not_disturb(tmp_path: Path) -> None:
    def claim(done: int) -> None:
        if done in (1, 4):
            with pytest.raises(UserError, match="wall"):
                pack(LostSource(5), tmp_path, samples_per_shard=2, strict=True)

    with no_locks():
        assert pack(RandomSource(5), tmp_path, samples_per_shard=2, on_progress=claim).samples == 5
    assert check_shards(tmp_path).samples == 5


@pytest.mark.parametrize("done", range(1, 6))
def test_without_locks_another_packing_may_finish_first(tmp_path: Path, done: int) -> None:
    def finish(now: int) -> None:
        if now == done:
            assert pack(RandomSource(5), tmp_path, samples_per_shard=2).samples == 5

    with no_locks():
        assert pack(RandomSource(5), tmp_path, samples_per_shard=2, on_progress=finish).samples == 5
    assert check_shards(tmp_path).samples == 5
    assert not list(tmp_path.glob("*.entry.json"))


def test_without_locks_notes_that_vanish_are_one_clear_line(tmp_path: Path) -> None:
    def forget(done: int) -> None:
        for note in tmp_path.glob("*.entry.json"):
            note.unlink()

    with no_locks(), pytest.raises(UserError, match="changed by another process: run this again"):
        pack(RandomSource(5), tmp_path, samples_per_shard=2, on_progress=forget)
    assert pack(RandomSource(5), tmp_path, samples_per_shard=2).samples == 5


def test_the_lock_is_on_a_file_that_can_be_written(tmp_path: Path) -> None:
    """Nodes that share a folder over NFS do not see each other's locks on folders."""
    with mock.patch("fcntl.flock") as flock:
        pack(RandomSource(1), tmp_path)
    file = flock.call_args.args[0]
    assert file.name == str(tmp_path / ".lock")
    assert file.mode == "ab"


def test_a_full_disk_is_one_clear_line_and_work_can_go_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no space left for .*run it again"):
        pack(FullDiskSource(4), tmp_path, samples_per_shard=1)
    assert len(list(tmp_path.glob("*.tar"))) == 2
    assert pack(RandomSource(4), tmp_path, samples_per_shard=1).samples == 4
    assert not list(tmp_path.glob(".*"))


_CHILD = """
import sys
from pathlib import Path
from data_pipeline.pack import pack
from tests.data_pipeline.children import await_no_process, start_script
from tests.data_pipeline.random_source import RandomSource
if __name__ == "__main__":
    pack(RandomSource(40, delay_seconds=0.05), Path(sys.argv[1]), samples_per_shard=4,
         on_progress=lambda done: print(done, flush=True))
"""


def test_a_killed_packing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_script(tmp_path / "child.py", _CHILD, str(out))
    assert process.stdout is not None
    while int(process.stdout.readline()) < 14:
        pass
    process.kill()
    process.communicate()
    await_no_process(process.pid)
    notes = list(out.glob("*.entry.json"))
    assert 1 <= len(notes) < 10
    assert not (out / "index.json").exists()
    with pytest.raises(UserError, match="did not finish"):
        ShardIndex.load(out)
    with pytest.raises(UserError, match="run the packing again"):
        build_index(out)
    # A kill may as well have come in the middle of any other write.
    for half_written in (".shard-000002.tar.9.partial", ".shard-000002.tar.entry.9.json", ".index.9.json"):
        (out / half_written).touch()
    kept = {
        path: path.stat().st_mtime_ns
        for path in out.glob("*.tar")
        if path.with_name(f"{path.name}.entry.json") in notes
    }

    progress: list[int] = []
    pack(RandomSource(40), out, samples_per_shard=4, on_progress=progress.append)
    assert progress[0] == 4 * len(notes)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    pack(RandomSource(40), tmp_path / "whole", samples_per_shard=4)
    assert digests(out) == digests(tmp_path / "whole")


def test_problems_of_shards_from_elsewhere_are_none(tmp_path: Path) -> None:
    assert read_problems(tmp_path) == ()


@pytest.mark.parametrize("text", ['{"key": "a"', '{"key": "a"}', "7"])
def test_a_damaged_list_of_problems_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "problems.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"problems.jsonl is damaged"):
        read_problems(tmp_path)


_ON_A_FULL_DISK = """
import subprocess, sys
from pathlib import Path
from configs.errors import UserError
from data_pipeline.pack import pack
from tests.data_pipeline.random_source import RandomSource
if __name__ == "__main__":
    out, whole, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", out], check=True)
    try:
        pack(RandomSource(40), out, samples_per_shard=4, workers=workers)
    except UserError as error:
        print(error)
    assert list(out.glob("*.tar")), "what was finished stays"
    subprocess.run(["mount", "-o", "remount,size=10m", out], check=True)
    pack(RandomSource(40), out, samples_per_shard=4, workers=workers)
    pack(RandomSource(40), whole, samples_per_shard=4)
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()
"""


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
@pytest.mark.parametrize("workers", [1, 2])
def test_packing_goes_on_where_a_disk_was_full(tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    done = run_with_mounts(tmp_path / "script.py", _ON_A_FULL_DISK, str(out), str(tmp_path / "whole"), str(workers))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"no space left for {out}")
    assert done.stdout.count("\n") == 1
