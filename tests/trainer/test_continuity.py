"""Which changes of configuration a run can continue with, and that its ranks share one folder."""

import os
from pathlib import Path
from unittest import mock

import pytest

from cluster.env import RankEnv
from configs.errors import UserError
from configs.load import dump_config
from tests.ranks import run_ranks
from tests.trainer.loop_run import loop_config
from trainer.continuity import check_continues
from trainer.loop import Trainer


def begun(folder: Path) -> Path:
    run_dir = folder / "run"
    (run_dir / "checkpoints" / "step_00000003").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump_config(loop_config(folder)))
    return run_dir


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=99",
        "data.workers=4",
        "data.train=elsewhere",
        "data.max_bad_samples=3",
        "parallel.ep_size=2",
        "train.images_per_step=8",
    ],
)
def test_length_place_and_layout_may_change(tmp_path: Path, override: str) -> None:
    check_continues(begun(tmp_path), loop_config(tmp_path, override))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=4", "seed"),
        ("model.width=64", "model.width"),
        ("tasks=[normal]", "tasks"),
        ("data.augment.flip=false", "data.augment.flip"),
        ("optim.lr=0.5", "optim.lr"),
    ],
)
def test_what_was_trained_may_not(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"another .*{key}"):
        check_continues(begun(tmp_path), loop_config(tmp_path, override))


def test_anything_goes_before_the_first_checkpoint(tmp_path: Path) -> None:
    run_dir = begun(tmp_path)
    (run_dir / "checkpoints" / "step_00000003").rmdir()
    check_continues(run_dir, loop_config(tmp_path, "seed=4"))


def _start_elsewhere(rank: int, world: int, folder: Path) -> str:
    config = loop_config(folder, "run_dir=run")
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))
    with (
        mock.patch("trainer.continuity._SEEN_WITHIN_SECONDS", 0.2),
        pytest.raises(UserError) as caught,
    ):
        Trainer(config, RankEnv(rank=rank, world=world, local_rank=rank))
    return str(caught.value)


def test_ranks_that_do_not_share_the_run_folder_are_refused(tmp_path: Path) -> None:
    first, second = run_ranks(_start_elsewhere, 2, tmp_path)
    assert first == second
    assert f"rank 1 does not see what rank 0 writes to the run folder ({tmp_path}/1/run on " in first
    assert "set run_dir to an absolute path on a file system that all nodes mount" in first
    assert [path.name for path in tmp_path.glob("*/run/*")] == [".lock"], "of rank 0; the other has made nothing"
