"""The shards of a run hold what it trains."""

from pathlib import Path

import pytest

from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.pack import pack
from data_pipeline.rooms.source import RoomsSource
from data_pipeline.run_shards import open_shards

OTHERS = {
    "lanes": {"like": "semseg", "class_names": ["road", "lane"]},
    "weather": {"like": "class_scene", "class_names": ["sun", "rain"]},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    pack(RoomsSource(images=2, size=32, seed=0), folder / "rooms")
    return folder / "rooms"


def config(shards: Path, *tasks: str, shares: dict[str, float] | None = None) -> RunConfig:
    data = {"train": str(shards), "val": str(shards), "task_shares": shares or {}}
    return RunConfig.model_validate({"define_tasks": OTHERS, "tasks": list(tasks), "data": data})


def test_a_task_without_any_label_is_refused(shards: Path) -> None:
    assert len(open_shards(config(shards, "normal", "semseg"), "train")) == 2
    message = r"rooms: no sample has a label of lanes, weather: .* \(here are class_object, .*normal.*\)"
    with pytest.raises(UserError, match=message):
        open_shards(config(shards, "lanes", "normal", "weather"), "train")


def test_labels_that_are_only_evaluated_or_not_served_may_be_absent(shards: Path) -> None:
    assert len(open_shards(config(shards, "normal", "lanes"), "val")) == 2
    assert len(open_shards(config(shards, "normal", "lanes", shares={"lanes": 0.0}), "train")) == 2
