"""The official split files: read as published, mistakes named, their counts beside what a folder holds."""

from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.sources.taskonomy_splits import SOURCE, Split, find_split_file, read_split

HEADER = "id,train,val,test"
LINES = [HEADER, "hanson,1,0,0", "merom,1,0,0", "corozal,0,1,0", "ihlen,0,0,1"]


def write_split(path: Path, lines: list[str], end: str = "\r") -> Path:
    path.write_bytes(end.join(lines).encode())
    return path


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"], ids=["CR", "LF", "CRLF"])
def test_every_line_end_is_read(tmp_path: Path, end: str) -> None:
    for lines in (LINES, [*LINES, ""]):
        split = read_split(write_split(tmp_path / "s.csv", lines, end), "tiny", "val")
        assert split == Split("tiny", "val", {"train": ("hanson", "merom"), "val": ("corozal",), "test": ("ihlen",)})
        assert split.buildings == ("corozal",)


def test_counts_stand_beside_the_published_ones(tmp_path: Path) -> None:
    split = read_split(write_split(tmp_path / "s.csv", LINES), "medium", "train")
    found = {"hanson", "ihlen", "elsewhere"}
    assert split.missing(found) == ("merom",)
    assert split.facts(found) == (
        "official split medium, part train",
        "train: 2 buildings listed (published: 99, 98 by its README), 1 of them in the source folder",
        "val: 1 buildings listed (published: 20), 0 of them in the source folder",
        "test: 1 buildings listed (published: 19, 20 by its README), 1 of them in the source folder",
    )


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "starts with ''"),
        (["id,train,val", "hanson,1,0"], "starts with 'id,train,val'"),
        ([*LINES, "hanson,1,0,0"], r"line 6, is 'hanson,1,0,0'"),
        ([HEADER, "hanson,1,1,0"], r"line 2, is 'hanson,1,1,0'"),
        ([HEADER, "hanson,0,0,0"], "line 2"),
        ([HEADER, "hanson,1,0"], "line 2"),
        ([HEADER, ",1,0,0"], "line 2"),
        ([HEADER, "hanson,yes,no,no"], "line 2"),
        ([HEADER, "corozal,0,1,0"], "no building into 'train'"),
    ],
)
def test_what_is_no_split_file_is_named(tmp_path: Path, lines: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=rf"s\.csv.*{reason}"):
        read_split(write_split(tmp_path / "s.csv", lines), "tiny", "train")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_bytes(b"\xff\xfe\x00PNG")
    for name in ("s.csv", "nowhere.csv"):
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            read_split(tmp_path / name, "tiny", "train")


def test_the_file_is_looked_for_beside_the_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no train_val_test_full\.csv: unpack {SOURCE}.*--split-csv"):
        find_split_file(tmp_path, "full")
    (tmp_path / "splits_taskonomy").mkdir()
    unpacked = write_split(tmp_path / "splits_taskonomy" / "train_val_test_full.csv", LINES)
    assert find_split_file(tmp_path, "full") == unpacked
    beside = write_split(tmp_path / "train_val_test_full.csv", LINES)
    assert find_split_file(tmp_path, "full") == beside
