"""Which checkpoints stay, and saves in the background."""

import errno
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from configs.errors import UserError
from configs.schema import CheckpointConfig
from tests.trainer.worlds import Case, engine_on, launched, whole_state, world_of_one
from trainer.checkpoint import saving
from trainer.checkpoint.files import FileEntry, describe_file
from trainer.checkpoint.reading import load_latest
from trainer.checkpoint.saving import CheckpointSaver, save
from trainer.engine import Engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    with world_of_one():
        engine = engine_on(0, 1, Case(1, 1))
        yield engine
        engine.close()


def save_steps(run_dir: Path, engine: Engine, steps: list[int], keep_last: int, keep_every: int | None = None) -> None:
    for step in steps:
        save(run_dir, engine, step=step, state={"step": step}, keep_last=keep_last, keep_every=keep_every)


def kept(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


def damage(run_dir: Path, step: int) -> None:
    path = run_dir / "checkpoints" / f"step_{step:08d}" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # of the same length: only the checksum tells
    path.write_bytes(content)


def test_every_nth_stays_beside_the_last(engine: Engine, tmp_path: Path) -> None:
    save_steps(tmp_path, engine, [5, 10, 15, 17, 20, 25, 30], keep_last=2, keep_every=10)
    assert kept(tmp_path) == [10, 20, 25, 30]


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_last(engine: Engine, tmp_path: Path) -> None:
    save_steps(tmp_path, engine, [1, 2], keep_last=3)
    damage(tmp_path, 2)
    save_steps(tmp_path, engine, [3], keep_last=2)
    assert kept(tmp_path) == [1, 3]
    damage(tmp_path, 3)
    restored = load_latest(tmp_path, engine)
    assert restored is not None
    assert restored.step == 1


def test_a_checkpoint_that_cannot_be_read_at_the_moment_stays_beside_the_last(engine: Engine, tmp_path: Path) -> None:
    save_steps(tmp_path, engine, [1, 2, 3], keep_last=3)
    failing = itertools.count()

    def describe(path: Path, real: Callable[[Path], FileEntry] = describe_file) -> FileEntry:
        if next(failing) == 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    with mock.patch("trainer.checkpoint.files.describe_file", describe):
        save_steps(tmp_path, engine, [4], keep_last=2)
    assert kept(tmp_path) == [2, 3, 4]


def test_what_cannot_be_removed_at_the_moment_goes_with_a_later_save(engine: Engine, tmp_path: Path) -> None:
    def remove(path: Path, ignore_errors: bool = False) -> None:
        if path.exists() and not ignore_errors:  # as on NFS while another process reads a file of it
            raise OSError(errno.EBUSY, "Device or resource busy")

    save_steps(tmp_path, engine, [1, 2], keep_last=2)
    with mock.patch("trainer.checkpoint.saving.shutil.rmtree", remove):
        save_steps(tmp_path, engine, [3, 2, 4, 3, 5], keep_last=1)  # as a run that falls back does
    assert kept(tmp_path) == [5]
    assert len(list((tmp_path / "checkpoints").glob(".*"))) == 6
    save_steps(tmp_path, engine, [6], keep_last=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000006"]


def test_a_run_that_fell_back_abandons_what_is_newer_and_keeps_what_it_came_from(
    engine: Engine, tmp_path: Path
) -> None:
    save_steps(tmp_path, engine, [4, 8, 10], keep_last=3)
    damage(tmp_path, 10)
    damage(tmp_path, 8)
    restored = load_latest(tmp_path, engine)
    assert restored is not None
    assert restored.step == 4
    assert [f"step_{step:08d}" in text for step, text in zip((10, 8), restored.damaged, strict=True)] == [True, True]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000004\n"
    again = load_latest(tmp_path, engine)
    assert again is not None
    assert (again.step, again.damaged) == (4, ()), "what was said once is settled"
    assert kept(tmp_path) == [4, 8, 10], "nothing goes before something new is safe"
    save_steps(tmp_path, engine, [9], keep_last=2)
    assert kept(tmp_path) == [4, 9]


def test_what_is_newer_than_latest_is_no_part_of_the_run(engine: Engine, tmp_path: Path) -> None:
    """As a kill between the renames of a checkpoint and of `latest` leaves it, or a user who moves `latest` back."""
    save_steps(tmp_path, engine, [4, 8], keep_last=3)
    (tmp_path / "checkpoints/latest").write_text("step_00000004\n")
    save_steps(tmp_path, engine, [9], keep_last=3)
    assert kept(tmp_path) == [4, 9]


def test_a_pointer_that_was_lost_costs_no_checkpoint(engine: Engine, tmp_path: Path) -> None:
    save_steps(tmp_path, engine, [1, 2], keep_last=3)
    for pointer in ("nonsense", "step_00000099"):
        (tmp_path / "checkpoints/latest").write_text(pointer)
        save_steps(tmp_path, engine, [3], keep_last=3)
        assert kept(tmp_path) == [1, 2, 3]


def test_what_is_saved_in_the_background_is_the_state_at_that_moment() -> None:
    for rank in launched().two_ranks:
        found = rank["background"]
        assert found["saved"].keys() == found["loaded"].keys()
        for name, value in found["saved"].items():
            assert torch.equal(found["loaded"][name], value), name
        assert not torch.equal(found["done"]["master.first.weight"], found["saved"]["master.first.weight"])


def test_an_error_in_the_background_of_one_rank_reaches_all_at_the_same_step() -> None:
    first, second = (rank["background"] for rank in launched().two_ranks)
    assert first["error"] == second["error"]
    assert "No space left on device" in first["error"]
    assert first["names"] == ["latest", "step_00000002", "step_00000005"]


def save_and_wait(saver: CheckpointSaver) -> None:
    saver.save(1, {})
    saver.wait()


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("error", [MemoryError("no memory"), SystemExit("a library's")], ids=["error", "exit"])
def test_what_is_no_fault_of_the_storage_ends_the_save_too(
    engine: Engine, tmp_path: Path, error: BaseException, async_save: bool
) -> None:
    saver = CheckpointSaver(tmp_path, engine, CheckpointConfig(async_save=async_save), lambda: pytest.fail("not saved"))
    with (
        mock.patch("trainer.checkpoint.saving.FileSystemWriter.write_data", side_effect=error),
        pytest.raises(RuntimeError, match=str(error)) as caught,
    ):
        save_and_wait(saver)
    assert type(caught.value.__cause__) is type(error)
    assert kept(tmp_path) == []


def test_what_a_thread_ends_with_is_raised(engine: Engine, tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, engine, CheckpointConfig(), lambda: pytest.fail("not saved"))
    failing = mock.patch("trainer.checkpoint.saving._begin", side_effect=GeneratorExit("no Exception"))
    with failing, pytest.raises(GeneratorExit):
        save_and_wait(saver)


def test_a_second_save_and_the_end_wait_for_the_first(engine: Engine, tmp_path: Path) -> None:
    order: list[str] = []
    saver = CheckpointSaver(tmp_path, engine, CheckpointConfig(keep_last=5), lambda: order.append("complete"))
    release = threading.Event()

    def slow(*_: object) -> None:
        release.wait(60)
        order.append("written")

    with (
        mock.patch("trainer.checkpoint.saving._begin", side_effect=slow),
        mock.patch("trainer.checkpoint.saving._save_tensors"),
        mock.patch("trainer.checkpoint.saving._describe_share", return_value={}),
        mock.patch("trainer.checkpoint.saving._complete", return_value=""),
        mock.patch("trainer.checkpoint.saving._prune"),
    ):
        saver.save(1, {})
        order.append("training")
        threading.Timer(0.2, release.set).start()
        saver.save(2, {})
        saver.close()
    assert order[:3] == ["training", "written", "complete"]
    assert order[3] == "written"


def test_without_async_save_a_checkpoint_is_complete_at_once(engine: Engine, tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, engine, CheckpointConfig(async_save=False, keep_last=1))
    saver.save(3, {"step": 3})
    assert kept(tmp_path) == [3]
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="cannot use the checkpoint folder"):
        saver.save(4, {})


def test_a_file_that_another_rank_wrote_elsewhere_makes_no_checkpoint(engine: Engine, tmp_path: Path) -> None:
    def describe(
        unfinished: Path, rank: int, real: Callable[..., Any] = saving._describe_share
    ) -> dict[str, FileEntry]:
        return {**real(unfinished, rank), "__1_0.distcp": FileEntry(bytes=1, sha256="0")}

    save_steps(tmp_path, engine, [1], keep_last=1)
    with (
        mock.patch("trainer.checkpoint.saving._describe_share", describe),
        pytest.raises(UserError, match=r"rank 0 does not see __1_0\.distcp"),
    ):
        save_steps(tmp_path, engine, [2], keep_last=1)
    assert kept(tmp_path) == [1]


@pytest.mark.parametrize("stage", [0, 1])
def test_training_on_does_not_reach_what_is_being_saved(stage: int, tmp_path: Path) -> None:
    trained = threading.Event()

    def begin(*args: Any, real: Callable[..., None] = saving._begin) -> None:
        trained.wait(60)
        real(*args)

    with world_of_one(), mock.patch("trainer.checkpoint.saving._begin", begin):
        engine = engine_on(0, 1, Case(1, stage))
        saver = CheckpointSaver(tmp_path, engine, CheckpointConfig())
        before, seen = whole_state(engine), torch.zeros(3)
        saver.save(1, {"seen": seen})
        engine.load_logical_state({name: value + 1 for name, value in engine.logical_state().items()})
        seen += 1
        trained.set()
        saver.wait()
        restored = load_latest(tmp_path, engine)
        after = whole_state(engine)
        engine.close()
    assert restored is not None
    assert restored.state["seen"].equal(torch.zeros(3))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_save_leaves_gpus_alone(engine: Engine, tmp_path: Path) -> None:
    # torch's loader for GPUs opens a context on the first one, in whichever thread saves.
    files = "torch.distributed.checkpoint.filesystem"
    with (
        mock.patch(f"{files}.torch.cuda.is_available", return_value=True),
        mock.patch(f"{files}._OverlappingCpuLoader", side_effect=AssertionError("looks for a GPU")),
    ):
        save(tmp_path, engine, step=1, state={}, keep_last=1)
    assert kept(tmp_path) == [1]
