"""`modsquad train`, `data check` and `data show` with shards behind a URL, as a user starts them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from tests.data_pipeline.shard_server import ShardServer, serve, status, truncate
from tests.trainer.cli.test_data import run as data
from tests.trainer.cli.test_main import modsquad
from tests.trainer.loop_run import loop_config, make_shards

STEPS = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardServer]:
    folder = tmp_path_factory.mktemp("served")
    make_shards(folder)
    loop_config(folder)
    with serve(folder) as server:
        yield server


def train(server: ShardServer, run: Path, place: str, *overrides: str) -> list[dict[str, Any]]:
    done = modsquad(
        "train",
        server.folder / "recipe.yaml",
        f"run_dir={run}",
        f"data.train={place}/train",
        f"data.val={place}/val",
        f"data.cache_dir={run.parent / 'cache'}",
        "data.shuffle_window_shards=2",
        f"train.steps={STEPS}",
        "checkpoint.every_steps=2",
        *overrides,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict[str, Any]]) -> list[Any]:
    return [(line["step"], line["loss"], line["task_loss"]) for line in lines if "loss" in line]


def test_a_run_from_a_url_is_that_of_the_folder_and_goes_on_from_either(server: ShardServer, tmp_path: Path) -> None:
    local = losses(train(server, tmp_path / "local", str(server.folder)))
    assert len(local) == STEPS
    server.faults["train/001.tar"] = [status(500), truncate(1000)]
    assert losses(train(server, tmp_path / "remote", server.url, "data.workers=2")) == local
    assert server.requests["train/001.tar"] == 3

    shutil.copytree(tmp_path / "local", tmp_path / "moved")
    (latest,) = (tmp_path / "moved" / "checkpoints").glob("step_*4")
    shutil.rmtree(latest)
    assert losses(train(server, tmp_path / "moved", server.url)) == local


def test_check_and_show(server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert "22 samples of 32 x 32 pixels in 3 shards" in data("check", f"{server.url}/train")
    data("show", f"{server.url}/val", tmp_path / "remote.png", "--count", "2")
    data("show", server.folder / "val", tmp_path / "local.png", "--count", "2")
    assert (tmp_path / "remote.png").read_bytes() == (tmp_path / "local.png").read_bytes()
    with pytest.raises(UserError, match=r"/none/index.json does not exist: give the URL of a folder of shards"):
        data("check", f"{server.url}/none")
    with pytest.raises(UserError, match=r"s3:// needs another package to be read: pip install s3fs"):
        data("check", "s3://bucket/train")
