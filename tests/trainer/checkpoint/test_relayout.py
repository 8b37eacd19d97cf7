"""A run that moves between layouts goes on as if it had stayed: world, ep_size, ZeRO stage, placement, all at once."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.trainer.loop_run import make_shards
from tests.trainer.noted_training import keys_of_steps, placed_experts
from tests.trainer.rank_processes import ends, lines_of, start_ranks
from trainer.checkpoint.files import read_state
from trainer.checkpoint.reading import read_weights

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

STEPS = 40
# All that a checkpoint must hold shows: matching statistics fill in for tasks that a step does not see, the learning
# rate falls, lines of the log span several steps, an epoch ends within, tasks are drawn, images cropped and routers
# disturbed at random.
OPTIONS = (
    f"train.steps={STEPS}",
    "train.images_per_step=4",
    "model.router_noise=true",
    "data.tasks_per_image=2",
    "matching.weight=0.05",
    "matching.ema_decay=0.9",
    "train.task_weighting=uncertainty",
    "train.log_every_steps=1",
    "evaluate.every_steps=5",
    "optim.warmup_steps=15",
    "optim.lr=0.002",
)


@dataclass(frozen=True)
class Layout:
    ranks: int
    ep_size: int
    zero_stage: int
    placement: str = "in_order"
    shadowed: int = 0

    @property
    def options(self) -> tuple[str, ...]:
        return (
            f"parallel.ep_size={self.ep_size}",
            f"parallel.zero_stage={self.zero_stage}",
            f"parallel.expert_placement={self.placement}",
            f"parallel.shadowed_experts={self.shadowed}",
        )


IN_ORDER = [Layout(4, 4, 1), Layout(2, 2, 2), Layout(1, 1, 0), Layout(4, 4, 2)]
AFFINE = [
    Layout(4, 4, 1, "task_affine", shadowed=2),
    Layout(2, 2, 2, "task_affine", shadowed=1),
    Layout(1, 1, 0, "task_affine"),
    Layout(4, 2, 2, "in_order"),
    Layout(4, 4, 0, "task_affine"),
]


def run(folder: Path, layout: Layout, *overrides: str, until: int) -> None:
    with mock.patch.dict(os.environ, STOP_AFTER=str(until if until < STEPS else 0)):
        processes = start_ranks(folder, layout.ranks, *OPTIONS, *layout.options, *overrides)
    results = ends(processes, 240)
    wanted = 143 if until < STEPS else 0
    assert [status for status, _ in results] == [wanted] * layout.ranks, [said for _, said in results]


@pytest.fixture(scope="module")
def stayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that nobody moved, beside its shards."""
    folder = tmp_path_factory.mktemp("stayed")
    make_shards(folder)
    run(folder, Layout(1, 1, 1), until=STEPS)
    return folder / "run"


def travel(stayed: Path, folder: Path, tour: Sequence[Layout], checkpoint_every: int) -> Path:
    """Train the same run in layout after layout, equally many steps in each."""
    for split in ("train", "val"):
        (folder / split).symlink_to(stayed.parent / split)
    for number, layout in enumerate(tour, start=1):
        run(folder, layout, f"checkpoint.every_steps={checkpoint_every}", until=STEPS * number // len(tour))
    return folder / "run"


def test_from_four_ranks_to_two_to_one_and_back_with_the_same_losses(stayed: Path, tmp_path: Path) -> None:
    moved = travel(stayed, tmp_path, IN_ORDER, checkpoint_every=5)
    assert_same_run(moved, stayed)
    assert keys_of_steps(moved) == keys_of_steps(stayed)
    assert placed_experts(moved) == {}


def test_a_task_affine_run_moves_between_layouts_with_the_same_losses(stayed: Path, tmp_path: Path) -> None:
    # It stops between two checkpoints, so that the next layout's places are others than those that were left.
    moved = travel(stayed, tmp_path, AFFINE, checkpoint_every=3)
    places = placed_experts(moved)
    assert {3, 8, 32} <= set(places), "after the first checkpoint, and where a task-affine layout begins"
    assert set(places) <= {3, 6, 8, 9, 12, 15, 32, 33, 36, 39}
    assert all(left for left, _ in places.values()), "experts lie elsewhere"
    shadowed = {step for step, (_, count) in places.items() if count}
    # On two ranks; to four, the weights of these tiny layers would be more bytes than their tokens.
    assert shadowed & {8, 9, 12, 15}
    assert max(shadowed) < 32, "where the layout allows none"
    assert_same_run(moved, stayed)
    # An image whose tasks live on several ranks is read by each of them.
    ours, theirs = keys_of_steps(moved), keys_of_steps(stayed)
    assert {step: set(keys) for step, keys in ours.items()} == {step: set(keys) for step, keys in theirs.items()}
    shared = {step for step, keys in ours.items() if len(keys) > len(theirs[step])}
    assert shared <= {*range(4, 17), *range(33, 41)}
    assert len(shared) > 10


def assert_same_run(moved: Path, stayed: Path) -> None:
    lines, wanted = lines_of(moved), lines_of(stayed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, wanted, strict=True):
        for key in ("epoch", "images", "pairs", "bad_steps", "learning_rate"):
            assert line[key] == other[key]
        for key in ("loss", "matching_loss", "gradient_norm", "task_loss", "mutual_information"):
            assert line[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), (line["step"], key)
    for folder in ("evaluation", "routing"):
        files = sorted(path.name for path in (stayed / folder).iterdir())
        assert len(files) == STEPS // 5
        for name in files:
            ours, theirs = (json.loads((run_dir / folder / name).read_text()) for run_dir in (moved, stayed))
            assert_close(ours, theirs, 1e-5)
    assert_same_state(state_of(moved), state_of(stayed))
    (_, weights), (_, others) = read_weights(moved), read_weights(stayed)
    # AdamW makes steps of rounding errors where a gradient is zero, as that of a bias of keys: absolute, too.
    assert_close(weights, others, 1e-4, absolute=1e-4)


def state_of(run_dir: Path) -> dict[str, Any]:
    return read_state(run_dir / "checkpoints" / f"step_{STEPS:08d}")


def assert_same_state(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours["cursor"] == theirs["cursor"]
    assert ours["cursor"]["position"] == 4 * STEPS
    assert_close(ours["matching"], theirs["matching"], 1e-5)
    assert ours["ledger"]["tasks"] == theirs["ledger"]["tasks"]
    for layer, other in zip(ours["ledger"]["layers"], theirs["ledger"]["layers"], strict=True):
        assert layer["tokens"] == other["tokens"]
        assert layer["counts"] == other["counts"], f"not one token of {STEPS} steps went to another expert"


def assert_close(ours: Any, theirs: Any, rtol: float, absolute: float = 0.0, where: str = "") -> None:
    """Compare nested mappings and sequences: tensors by their largest element, floats, all else exactly."""
    if isinstance(theirs, Mapping):
        assert ours.keys() == theirs.keys(), where
        for name, value in theirs.items():
            assert_close(ours[name], value, rtol, absolute, f"{where}.{name}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, value in enumerate(theirs):
            assert_close(ours[number], value, rtol, absolute, f"{where}[{number}]")
    elif isinstance(theirs, torch.Tensor):
        atol = max(absolute, rtol * theirs.double().abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text: f"{where}: {text}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=rtol, abs=max(absolute, 1e-7)), where
    else:
        assert ours == theirs, where
