"""Experts that lie elsewhere, and pairs that are dealt by task, change no number but the bytes between ranks."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cluster.env import RankEnv
from cluster.placement import LayerPlaces
from data_pipeline.batch import Batch
from data_pipeline.planning.dealing import TaskHomes
from data_pipeline.targets import Prepared, prepare_batch
from model.mod_squad import ModSquad
from tests.ranks import run_ranks
from tests.trainer.loop_run import loop_config, make_shards
from tests.trainer.parity import Run
from tests.trainer.parity_check import check
from trainer.checkpoint.reading import read_weights
from trainer.distributed.affine_placement import AffinePlacement
from trainer.loop import Trainer
from trainer.run_files import read_latest_ledger

STEPS = 9
RUN = (
    f"train.steps={STEPS}",
    "optim.eps=1e-3",
    "optim.lr=0.003",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=3",
    "model.router_noise=true",  # the shared block runs an image on both ranks, and must draw the same for it
    "model.shared_blocks=1",
)
AFFINE = ("parallel.ep_size=2", "parallel.expert_placement=task_affine")


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.faults)])
def test_moved_experts_train_as_plain_torch(world: int) -> None:
    check(
        [
            Run(world, 2, stage, dtype, accumulation, clips=True, routing="few_tasks", moves=True)
            for stage, dtype, accumulation in (
                [(0, "fp32", 1), (1, "fp32", 2), (2, "bf16", 1), (0, "bf16", 2)] if world == 2 else [(2, "fp32", 2)]
            )
        ]
    )


def train_counting(rank: int, world: int, folder: Path, overrides: tuple[str, ...]) -> list[tuple[list[int], int]]:
    """Train; return, of every step of this rank, its pairs of each task and the bytes that it sent."""
    trainer = Trainer(loop_config(folder, *RUN, *overrides), RankEnv(rank=rank, world=world, local_rank=rank))
    notes: list[tuple[list[int], int]] = []

    def noted(batch: Batch, *args: Any) -> Prepared:
        counts = torch.bincount(batch.pair_task, minlength=len(trainer.parts.tasks))
        notes.append((counts.tolist(), trainer.parts.traffic.sent_bytes))
        return prepare_batch(batch, *args)

    with mock.patch("trainer.loop.prepare_batch", noted):
        trainer.fit()
    return notes


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same shards twice, for a run in order and one that is task-affine."""
    found = tmp_path_factory.mktemp("in_order"), tmp_path_factory.mktemp("task_affine")
    for folder in found:
        make_shards(folder)
    return found


@pytest.fixture(scope="module")
def noted(folders: tuple[Path, Path]) -> tuple[list[Any], list[Any]]:
    """What the ranks of both runs noted."""
    in_order, affine = folders
    return (
        run_ranks(train_counting, 2, in_order, ("parallel.ep_size=2",)),
        run_ranks(train_counting, 2, affine, AFFINE),
    )


def test_what_moved_is_said() -> None:
    homes = TaskHomes(2, (0, 1))
    first = AffinePlacement(homes=homes, layers={"a": LayerPlaces(order=(0, 3, 2, 1), shadowed=(1,))})
    then = AffinePlacement(homes=homes, layers={"a": LayerPlaces(order=(3, 0, 2, 1))})
    assert first.describe(None) == "experts placed by task: 2 of 4 moved to another rank, 1 shadowed"
    assert then.describe(first) == "experts placed by task: 0 of 4 moved to another rank, 0 shadowed"


@pytest.mark.usefixtures("noted")
def test_the_run_is_the_same(folders: tuple[Path, Path]) -> None:
    in_order, affine = (lines_of(folder) for folder in folders)
    assert len(in_order) == len(affine) == STEPS
    for expected, found in zip(in_order, affine, strict=True):
        for key in ("loss", "gradient_norm", "images"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), key
    (_, weights), (_, moved) = (read_weights(folder / "run") for folder in folders)
    assert weights.keys() == moved.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            moved[name], weight, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
        )
    first, second = (read_latest_ledger(folder / "run") for folder in folders)
    assert first is not None
    assert second is not None
    for name, counts in first[1].counts.items():
        assert (second[1].counts[name] - counts).abs().sum() <= 0.01 * counts.sum()


def test_ranks_have_equally_many_pairs_of_few_tasks(noted: tuple[list[Any], list[Any]]) -> None:
    in_order, affine = noted
    for step in range(STEPS):
        before, after = ([torch.tensor(rank[step][0]) for rank in ranks] for ranks in (in_order, affine))
        assert torch.equal(before[0] + before[1], after[0] + after[1]), "the global batch is the same"
        assert abs(after[0].sum() - after[1].sum()) <= 1
        shared = int(((after[0] > 0) & (after[1] > 0)).sum())
        assert shared <= 1 or step < 3, "after the first checkpoint a task lives on one rank, or on two neighbours"
    assert all(int((torch.tensor(rank[0][0]) > 0).sum()) == 4 for rank in affine), "before, all tasks are everywhere"


def test_a_run_goes_on_with_the_placement_of_its_checkpoint(
    folders: tuple[Path, Path], noted: tuple[list[Any], list[Any]]
) -> None:
    _, affine = folders
    before = lines_of(affine)
    for step in (6, 9):
        shutil.rmtree(affine / "run" / "checkpoints" / f"step_{step:08d}")
    again = run_ranks(train_counting, 2, affine, AFFINE)
    assert [[pairs for pairs, _ in rank] for rank in again] == [[pairs for pairs, _ in rank[3:]] for rank in noted[1]]
    assert [line["loss"] for line in lines_of(affine)] == [line["loss"] for line in before]


def place_differently(rank: int, world: int, folder: Path) -> AffinePlacement | None:
    """Begin a run on ranks that would choose different places; return this one's."""
    config = loop_config(folder, *RUN, *AFFINE)
    names = [layer.name for layer in ModSquad(config.model, config.task_specs, config.data.image_size).expert_layers]
    order = (0, 2, 1, 3) if rank == 0 else (0, 3, 1, 2)
    own = AffinePlacement(homes=TaskHomes(2, (0, 1, 2, 3)), layers={name: LayerPlaces(order=order) for name in names})
    with mock.patch("trainer.loop.choose_placement", return_value=own):
        trainer = Trainer(config, RankEnv(rank=rank, world=world, local_rank=rank))
    placement = trainer._placement
    trainer.close()
    return placement


def test_all_ranks_take_the_places_that_one_has_chosen(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(folders[0] / split)
    first, second = run_ranks(place_differently, 2, tmp_path)
    assert first == second
    assert {places.order for places in first.layers.values()} == {(0, 2, 1, 3)}
