from pathlib import Path

import pytest

from configs.atomic import atomic_path, write_text_atomically
from configs.errors import UserError


def test_folders_on_the_way_are_made_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    write_text_atomically(target, "straße")
    assert target.read_text(encoding="utf-8") == "straße"
    assert list(target.parent.iterdir()) == [target]


def test_writers_of_one_file_do_not_meet_even_with_equal_process_ids(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with atomic_path(target) as first:
        first.write_text("first")
        with atomic_path(target) as second:
            second.write_text("second")
        assert target.read_text() == "second"
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def write_and_stop(target: Path) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError("stop")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text_atomically(target, "old")
    with pytest.raises(RuntimeError, match="stop"):
        write_and_stop(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*x\.txt: File exists"):
        write_text_atomically(tmp_path / "file" / "x.txt", "text")
