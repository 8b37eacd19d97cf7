"""A run that moves between layouts goes on as if it had stayed: world, ep_size and ZeRO stage, all at once."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.trainer.loop_run import make_shards
from tests.trainer.noted_training import keys_of_steps
from tests.trainer.rank_processes import ends, lines_of, start_ranks
from trainer.checkpoint.files import read_state
from trainer.checkpoint.reading import read_weights

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

LAYOUTS = [(4, 4, 1), (2, 2, 2), (1, 1, 0), (4, 4, 2)]  # ranks, ep_size, ZeRO stage; ten steps each
STEPS = 10 * len(LAYOUTS)
# All that a checkpoint must hold shows: matching statistics fill in for tasks that a step does not see, the learning
# rate falls, lines of the log span several steps, an epoch ends within, tasks are drawn, images cropped and routers
# disturbed at random.
OPTIONS = (
    "train.images_per_step=4",
    "model.router_noise=true",
    "data.tasks_per_image=2",
    "matching.weight=0.05",
    "matching.ema_decay=0.9",
    "train.task_weighting=uncertainty",
    "train.log_every_steps=1",
    "checkpoint.every_steps=5",
    "optim.warmup_steps=15",
    "optim.lr=0.002",
)


def run(folder: Path, ranks: int, ep_size: int, stage: int, until: int) -> None:
    layout = (f"parallel.ep_size={ep_size}", f"parallel.zero_stage={stage}", f"train.steps={STEPS}")
    with mock.patch.dict(os.environ, STOP_AFTER=str(until if until < STEPS else 0)):
        processes = start_ranks(folder, ranks, *OPTIONS, *layout)
    results = ends(processes, 240)
    wanted = 143 if until < STEPS else 0
    assert [status for status, _ in results] == [wanted] * ranks, [said for _, said in results]


def state_of(run_dir: Path) -> dict[str, Any]:
    return read_state(run_dir / "checkpoints" / f"step_{STEPS:08d}")


def test_from_four_ranks_to_two_to_one_and_back_with_the_same_losses(tmp_path: Path) -> None:
    folders = tmp_path / "stayed", tmp_path / "moved"
    make_shards(folders[0])
    folders[1].mkdir()
    for split in ("train", "val"):
        (folders[1] / split).symlink_to(folders[0] / split)
    run(folders[0], 1, 1, 1, STEPS)
    for number, layout in enumerate(LAYOUTS, start=1):
        run(folders[1], *layout, 10 * number)
    stayed, moved = (folder / "run" for folder in folders)

    lines, wanted = lines_of(moved), lines_of(stayed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, wanted, strict=True):
        for key in ("epoch", "images", "pairs", "bad_steps", "learning_rate"):
            assert line[key] == other[key]
        for key in ("loss", "matching_loss", "gradient_norm", "task_loss", "mutual_information"):
            assert line[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), (line["step"], key)
    assert keys_of_steps(moved) == keys_of_steps(stayed)

    ours, theirs = state_of(moved), state_of(stayed)
    assert ours.keys() == theirs.keys()
    assert ours["cursor"] == theirs["cursor"]
    assert ours["cursor"]["position"] == 4 * STEPS
    assert_close(ours["matching"], theirs["matching"], 1e-5)
    assert ours["ledger"]["tasks"] == theirs["ledger"]["tasks"]
    for layer, other in zip(ours["ledger"]["layers"], theirs["ledger"]["layers"], strict=True):
        assert layer["tokens"] == other["tokens"]
        assert layer["counts"] == other["counts"], "not one token of 40 steps went to another expert"
    (_, weights), (_, others) = read_weights(moved), read_weights(stayed)
    # AdamW makes steps of rounding errors where a gradient is zero, as that of a bias of keys: absolute, too.
    assert_close(weights, others, 1e-4, absolute=1e-4)


def assert_close(ours: Mapping[str, Any], theirs: Mapping[str, Any], rtol: float, absolute: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            atol = max(absolute, rtol * value.double().abs().max().item())
            torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert ours[name] == value
