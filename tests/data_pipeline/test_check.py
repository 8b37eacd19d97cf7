"""The check of a folder: counts, statistics against the labels themselves, and changed bytes."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from configs.errors import UserError
from data_pipeline.check import CheckReport, check_shards
from data_pipeline.pack import pack
from data_pipeline.source import Problem, format_problems
from tests.data_pipeline.random_source import FaultySource, RandomSource, UnknownSource, random_sample


def printed(report: CheckReport) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(report.table())
    return console.export_text()


def test_counts_and_problems(tmp_path: Path) -> None:
    pack(FaultySource(7), tmp_path, samples_per_shard=3)
    report = check_shards(tmp_path)
    assert (report.samples, report.shards, report.size) == (5, 3, 16)
    assert report.file_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert {row.task: row.labels for row in report.tasks} == {"class_scene": 5, "depth_zbuffer": 4, "normal": 3}
    assert len(report.problems) == 5
    text = printed(report)
    for part in ("5 samples of 16 x 16 pixels in 3 shards", "left out: 2 of normal", "left out: 2 of whole samples"):
        assert part in text


def test_statistics_are_those_of_the_known_targets(tmp_path: Path) -> None:
    pack(RandomSource(6, tasks=("depth_zbuffer", "semseg")), tmp_path)
    rows = {row.task: row for row in check_shards(tmp_path).tasks}
    samples = [random_sample(index, tasks=("depth_zbuffer", "semseg")) for index in range(6)]
    depth = np.stack([sample.labels["depth_zbuffer"] for sample in samples])
    valid = np.stack([sample.mask_valid == 255 for sample in samples]) & (depth != 65535)
    values = np.log1p(depth[valid].astype(np.float64)) / np.log(65536)
    row = rows["depth_zbuffer"]
    assert (row.labels, row.decoded) == (6, 6)
    np.testing.assert_allclose(
        [row.known, row.low, row.mean, row.high], [valid.mean(), values.min(), values.mean(), values.max()], rtol=1e-5
    )
    ids = np.stack([sample.labels["semseg"] for sample in samples])
    assert (rows["semseg"].low, rows["semseg"].high) == (ids.min(), ids.max())
    assert rows["semseg"].mean == pytest.approx(ids.mean())
    assert rows["semseg"].known == 1.0


def test_a_label_of_which_nothing_is_known_has_no_statistics(tmp_path: Path) -> None:
    pack(UnknownSource(1), tmp_path)
    (row,) = check_shards(tmp_path).tasks
    assert row.known == 0.0
    assert np.isnan([row.low, row.mean, row.high]).all()
    assert "nan" in printed(check_shards(tmp_path))


def test_changed_bytes_are_found(tmp_path: Path) -> None:
    pack(RandomSource(4), tmp_path)
    (shard,) = tmp_path.glob("*.tar")
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-000000\.tar.*checksum"):
        check_shards(tmp_path)


def test_problems_are_printed_as_they_are(tmp_path: Path) -> None:
    pack(RandomSource(1), tmp_path)
    (tmp_path / "problems.jsonl").write_text(format_problems([Problem("k", "normal", "empty", "[raw]/[/b].png")]))
    assert "sample k, normal, [raw]/[/b].png: empty" in printed(check_shards(tmp_path))


def test_facts_of_the_packing_are_shown(tmp_path: Path) -> None:
    pack(RandomSource(1), tmp_path, facts=["25 [buildings] listed", "20 found"])
    assert check_shards(tmp_path).facts == ("25 [buildings] listed", "20 found")
    lines = [line.strip() for line in printed(check_shards(tmp_path)).splitlines()]
    assert lines[-2:] == ["25 [buildings] listed", "20 found"]
    (tmp_path / "pack.json").write_text("[]")
    with pytest.raises(UserError, match=r"pack\.json is damaged"):
        check_shards(tmp_path)
    (tmp_path / "pack.json").unlink()
    assert check_shards(tmp_path).facts == ()


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shards"):
        check_shards(tmp_path)
