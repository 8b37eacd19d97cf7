"""A cursor survives JSON and refuses other data."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import UserError
from data_pipeline.cursor import Cursor


def index(fingerprint: str) -> Any:
    return SimpleNamespace(fingerprint=fingerprint, storage=SimpleNamespace(place="shards"))


def test_a_cursor_advances_and_survives_json() -> None:
    cursor = Cursor.start(index("abc"), seed=3).advanced(8).advanced(4)
    assert cursor == Cursor(12, 3, "abc")
    assert Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))) == cursor
    cursor.check(index("abc"), seed=3)


def test_other_shards_or_another_seed_are_refused() -> None:
    cursor = Cursor(12, 3, "abc")
    with pytest.raises(UserError, match="changed since the checkpoint"):
        cursor.check(index("abd"), seed=3)
    with pytest.raises(UserError, match="seed 4 differs"):
        cursor.check(index("abc"), seed=4)
