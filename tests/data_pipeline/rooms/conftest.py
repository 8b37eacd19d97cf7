import pytest

from data_pipeline.rooms.generate import make_room
from data_pipeline.sample import Sample

SIZE = 64


@pytest.fixture(scope="session")
def rooms() -> list[Sample]:
    """Eight rooms with all labels."""
    return [make_room(7, index, SIZE) for index in range(8)]


@pytest.fixture(scope="session")
def many_rooms() -> list[Sample]:
    """Sixty small rooms with the class labels only."""
    return [make_room(3, index, 48, ["semseg", "human_parts", "class_scene", "class_object"]) for index in range(60)]
