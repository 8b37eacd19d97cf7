"""Rooms as a source: numbered as the dataset numbers them, mistakes named before any room is made."""

import numpy as np
import pytest

from configs.errors import UserError
from data_pipeline.rooms.generate import make_room
from data_pipeline.rooms.source import RoomsSource


def test_sources_that_do_not_overlap_share_no_room() -> None:
    train, val = RoomsSource(2, 32, seed=3), RoomsSource(1, 32, seed=3, offset=2)
    assert (len(train), len(val)) == (2, 1)
    assert train.name != val.name
    room, expected = val[0], make_room(3, 2, 32)
    assert room.key == expected.key != train[1].key
    np.testing.assert_array_equal(room.rgb, expected.rgb)
    assert room.labels.keys() == expected.labels.keys()


@pytest.mark.parametrize(
    "mistake", [{"images": 0}, {"size": 16}, {"size": 4096}, {"seed": -1}, {"offset": -1}], ids=str
)
def test_mistakes_are_named_at_once(mistake: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(str(value) for value in mistake.values())):
        RoomsSource(**{"images": 1, "size": 32, "seed": 0, **mistake})
