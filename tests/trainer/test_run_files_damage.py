"""A run folder with binary damage: readers name the file in one line, or give what is whole; no traceback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from tests.trainer.run_folder import conflict_record, write_run_folder
from trainer.journal import truncate_lines
from trainer.run_files import read_config, read_latest_conflict, read_latest_evaluation, read_latest_ledger, read_steps

FILES: list[tuple[str, Callable[[Path], Any]]] = [
    ("config.yaml", read_config),
    ("metrics.jsonl", read_steps),
    ("metrics.jsonl", lambda run: truncate_lines(run, 3)),
    ("evaluation/step_*_val.json", read_latest_evaluation),
    ("routing/step_*.json", read_latest_ledger),
    ("conflict/step_*.json", read_latest_conflict),
]
every_file = pytest.mark.parametrize(("pattern", "read"), FILES)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = write_run_folder(tmp_path / "run")
    (run / "conflict").mkdir(exist_ok=True)
    (run / "conflict" / "step_00000040.json").write_text(conflict_record().model_dump_json())
    return run


def read_or_refuse(run: Path, path: Path, read: Callable[[Path], Any]) -> None:
    try:
        read(run)
    except UserError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message
    assert path.name in message


@every_file
@pytest.mark.parametrize("damage", [b"\xff\xfe", b"\0" * 64, b"[" * 3000, b"9" * 5000, b"7", b"null", b'{"step": []}'])
def test_files_of_something_else_are_named(run: Path, pattern: str, read: Callable[[Path], Any], damage: bytes) -> None:
    path = max(run.glob(pattern), default=None)
    assert path is not None
    good = path.read_bytes()
    for content in (damage + b"\n" + good, good + damage + b"\n", good[:40] + damage + good[40:], damage):
        path.write_bytes(content)
        read_or_refuse(run, path, read)


@every_file
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_named(run: Path, pattern: str, read: Callable[[Path], Any], data: st.DataObject) -> None:
    path = max(run.glob(pattern))
    good = path.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    cut = data.draw(st.integers(0, 20))
    path.write_bytes(good[:place] + data.draw(st.binary(max_size=20)) + good[place + cut :])
    try:
        read_or_refuse(run, path, read)
    finally:
        path.write_bytes(good)


def test_a_line_of_zeros_is_named_where_a_run_goes_on(run: Path) -> None:
    """As a file system leaves it after a loss of power."""
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 100 + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line \d+, is damaged: delete that line"):
        truncate_lines(run, 3)
