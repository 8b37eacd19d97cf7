"""The page about own data: its files are written and its commands run, in the order in which they stand there."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.task_definitions import TaskDefinition
from configs.tasks import TASKS
from data_pipeline.index import ShardIndex
from data_pipeline.sources.folder_spec import FolderSpec, SplitRule
from tests.own_house import FRAMES, SCENES, write_house

pytestmark = pytest.mark.timeout(900)
PAGE = (Path(__file__).parent.parent / "docs" / "own_data.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything on the page was done."""
    folder = tmp_path_factory.mktemp("page")
    write_house(folder / "house")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for language, block in re.findall(r"```(yaml|sh)\n(.*?)```", PAGE, flags=re.DOTALL):
        if language == "yaml":
            (folder / block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL):
        for command in block.splitlines():
            done = subprocess.run(
                shlex.split(command),
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return folder


def test_the_parts_hold_all_frames_and_share_no_scene(folder: Path) -> None:
    keys = [ShardIndex.load(folder / "shards" / part).keys for part in ("train", "val")]
    assert len(keys[0]) + len(keys[1]) == len(SCENES) * FRAMES
    scenes = [{key.split("/")[0] for key in part} for part in keys]
    assert scenes[0].isdisjoint(scenes[1])
    assert scenes[1] == {"garage", "kitchen"}


def test_labels_are_what_the_page_says(folder: Path) -> None:
    train, val, table = (ShardIndex.load(folder / "shards" / part) for part in ("train", "val", "table"))
    assert [index.suffix(0, "rgb") for index in (train, val, table)] == ["png", "jpg", "webp"]
    number = train.keys.index(next(key for key in train.keys if key.endswith("/00") and not key.startswith(SCENES[-1])))
    classes = train.label(number, TASKS["semseg"])
    assert set(np.unique(classes)) <= {0, 5, 9, 255}
    assert (classes == 255).any()
    assert {task for task in ("depth_zbuffer", "normal", "semseg", "edges") if train.has(number, task)} == set(
        train.tasks
    )
    towards_camera = train.label(number, TASKS["normal"])[..., 2][train.mask_valid(number)]
    assert (towards_camera < 128).mean() > 0.9, "z is stored away from the camera"
    kind = table.label(table.keys.index("photos/barn/00"), table.task_table["kind"])
    assert kind.tolist() == [0.0, 1.0]
    assert table.suffix(0, "depth_zbuffer") == "plz"


def test_it_was_trained(folder: Path) -> None:
    for run, task in (("house", "semseg"), ("kinds", "kind")):
        lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
        assert any(json.loads(line).get("task_loss", {}).get(task) for line in lines)


def test_the_page_names_every_key_and_task() -> None:
    named = set(re.findall(r"`([a-z_0-9]+)[`:]", PAGE))
    tasks = {task for task in TASKS if not task.startswith(("edge_", "keypoints"))}
    assert tasks <= named
    assert (set(FolderSpec.model_fields) | set(SplitRule.model_fields)) <= named
    assert set(TaskDefinition.model_fields) <= named
