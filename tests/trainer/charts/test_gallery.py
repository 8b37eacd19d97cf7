from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from data_pipeline.index import ShardIndex
from tests.trainer.tiny_run import SIDE, TASKS, UNLABELLED, tiny_config, tiny_model, write_shards
from trainer.charts.gallery import TILE, RoomPictures, TaskPictures, draw_room, predict_rooms


def test_every_task_is_predicted_and_the_truth_shown_where_it_exists(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    write_shards(tmp_path / "val", samples=4)
    rooms = predict_rooms(tiny_model(config), config, 3)
    assert [room.key for room in rooms] == ["sample_000000", "sample_000001", "sample_000002"]
    for number, room in enumerate(rooms):
        assert [item.task for item in room.tasks] == list(TASKS)
        assert [item.truth is None for item in room.tasks] == [number == UNLABELLED, False, False]
        assert all(item.prediction.dtype == np.uint8 for item in room.tasks)
        np.testing.assert_array_equal(room.rgb, ShardIndex.load(tmp_path / "val").image(number))


def test_asking_for_more_images_than_there_are_gives_all(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    write_shards(tmp_path / "val", samples=2)
    assert len(predict_rooms(tiny_model(config), config, 10)) == 2


def test_missing_shards_are_named(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path / "val")):
        predict_rooms(tiny_model(config), config, 1)


@pytest.mark.parametrize(("tasks", "columns", "rows"), [(1, 2, 1), (6, 7, 1), (7, 7, 2), (13, 7, 2)])
def test_a_sheet_has_a_place_for_every_task(tasks: int, columns: int, rows: int, tmp_path: Path) -> None:
    white = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    drawn = [TaskPictures(task=f"task{i}", truth=white if i else None, prediction=white) for i in range(tasks)]
    draw_room(tmp_path / "room.png", RoomPictures(key="room", rgb=white, tasks=tuple(drawn)))
    with Image.open(tmp_path / "room.png") as image:
        assert image.width // TILE == columns
        assert image.height // (2 * TILE) == rows
        solid = (np.asarray(image) == 255).all(axis=2).sum() / TILE**2
    assert round(solid) == 2 * tasks  # the photo, every prediction, every truth but one
