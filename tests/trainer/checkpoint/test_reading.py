import errno
import itertools
import json
import os
import signal
import traceback
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from configs.errors import UserError
from tests.trainer.worlds import CLIPS, Case, engine_on, launched, resume, world_of_one
from trainer.checkpoint.reading import load_latest, read_weights
from trainer.checkpoint.saving import save
from trainer.engine import Engine
from trainer.run_lock import lock_run


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        atol = tolerance * value.abs().max().item()
        torch.testing.assert_close(state[name], value, rtol=tolerance, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_resume_on_the_same_layout_is_bit_identical() -> None:
    for rank in launched().two_ranks:
        for (saved, done), (loaded, resumed) in zip(rank["saved"], rank["resumed"], strict=True):
            assert_equal(loaded, saved)
            assert_equal(resumed, done)


def test_two_ranks_resume_what_four_saved() -> None:
    """Other world, other ep_size, other ZeRO stage: the same numbers, and the same training from there."""
    saved, done = launched().four_ranks[0]["saved"]
    for rank in launched().two_ranks:
        for loaded, resumed in rank["resumed_from_four"]:
            assert_equal(loaded, saved)
            assert_equal(resumed, done, 1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_process_resumes_what_four_ranks_saved(stage: int) -> None:
    saved, done = launched().four_ranks[0]["saved"]
    with world_of_one():
        loaded, resumed = resume(0, 1, Case(1, stage, clip_norm=CLIPS[1]), launched().folder / "four")
    assert_equal(loaded, saved)
    assert_equal(resumed, done, 1e-6)


def test_weights_are_read_without_an_engine() -> None:
    step, weights = read_weights(launched().folder / "four")
    saved, _ = launched().four_ranks[0]["saved"]
    assert step == 2
    masters = {name.removeprefix("master."): value for name, value in saved.items() if name.startswith("master.")}
    assert_equal(weights, masters)


def test_full_disk_is_one_error_on_all_ranks_and_leaves_the_last_checkpoint() -> None:
    errors = [rank["full_disk"] for rank in launched().two_ranks]
    if errors[0] is None:
        pytest.skip("this user may not mount a tmpfs")
    assert errors[0] == errors[1]
    assert len(errors[0]) > 3, "the disk was full at several files"
    assert all("\n" not in error and "free some space" in error for error in errors[0])


def test_a_file_that_torch_cuts_short_is_told_as_a_storage_error(engine: Engine, tmp_path: Path) -> None:
    # What torch makes of a disk that is full within a tensor, seen with tensors larger than those of the test above.
    cause = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    failure = CheckpointException("write", {0: (cause, traceback.StackSummary())})
    save_steps(tmp_path, engine, [1])
    with (
        mock.patch("trainer.checkpoint.saving.save_tensors", side_effect=failure),
        pytest.raises(UserError, match=r"could not be written whole.*free some space"),
    ):
        save_steps(tmp_path, engine, [2])
    assert folders(tmp_path) == ["latest", "step_00000001"]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with world_of_one():
        engine = engine_on(0, 1, Case(1, 1))
        yield engine
        engine.close()


def save_steps(run_dir: Path, engine: Engine, steps: list[int], keep_last: int = 2) -> None:
    for step in steps:
        save(run_dir, engine, step=step, state={"step": step}, keep_last=keep_last)


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_no_checkpoint_is_none(engine: Engine, tmp_path: Path) -> None:
    assert load_latest(tmp_path, engine) is None
    with pytest.raises(UserError, match="has no intact checkpoint: train it first"):
        read_weights(tmp_path)


def test_only_the_last_are_kept(engine: Engine, tmp_path: Path) -> None:
    save_steps(tmp_path, engine, [1, 5, 12], keep_last=2)
    assert folders(tmp_path) == ["latest", "step_00000005", "step_00000012"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000012\n"
    manifest = json.loads((tmp_path / "checkpoints/step_00000012/manifest.json").read_text())
    assert (manifest["step"], manifest["world"], manifest["ep_size"], manifest["zero_stage"]) == (12, 1, 1, 1)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest", "no_manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_named(engine: Engine, tmp_path: Path, damage: str) -> None:
    save_steps(tmp_path, engine, [1, 2])
    newest = tmp_path / "checkpoints/step_00000002"
    tensors = newest / "__0_0.distcp"
    content = bytearray(tensors.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    elif damage == "cut":
        tensors.write_bytes(content[:-1])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text("{")
    else:
        (newest / "manifest.json").unlink()
    restored = load_latest(tmp_path, engine)
    assert restored is not None
    assert (restored.step, restored.state) == (1, {"step": 1})
    assert len(restored.damaged) == 1
    assert "step_00000002" in restored.damaged[0]
    save_steps(tmp_path, engine, [2])
    again = load_latest(tmp_path, engine)
    assert again is not None
    assert (again.step, again.damaged) == (2, ())


@pytest.mark.parametrize("read", ["hashlib.file_digest", "trainer.checkpoint.files.Path.read_bytes"])
def test_a_checkpoint_that_cannot_be_read_is_neither_damaged_nor_passed_over(
    engine: Engine, tmp_path: Path, read: str
) -> None:
    save_steps(tmp_path, engine, [1, 2])
    told = rf"cannot read the checkpoint {tmp_path}/checkpoints/step_00000002 \(.*Stale file handle.*\): try the same"
    with mock.patch(read, side_effect=OSError(errno.ESTALE, "Stale file handle")):
        with pytest.raises(UserError, match=told):
            load_latest(tmp_path, engine)
        with pytest.raises(UserError, match=told):
            read_weights(tmp_path)
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000002\n"
    restored = load_latest(tmp_path, engine)
    assert restored is not None
    assert (restored.step, restored.damaged) == (2, ())


def test_what_one_rank_cannot_read_ends_all_and_leaves_the_newest_checkpoint_the_latest() -> None:
    (first, latest), (second, _) = (rank["unreadable"] for rank in launched().two_ranks)
    assert first == second
    assert "step_00000002 ([Errno 116] Stale file handle)" in first
    assert latest == "step_00000002\n"


@pytest.mark.parametrize(
    ("cause", "told"),
    [(MemoryError("no memory"), RuntimeError), (OSError(errno.ESTALE, "Stale file handle"), UserError)],
)
def test_tensors_that_cannot_be_read_are_an_error_that_callers_handle(
    engine: Engine, tmp_path: Path, cause: Exception, told: type[Exception]
) -> None:
    save_steps(tmp_path, engine, [1])
    with mock.patch("trainer.checkpoint.reading.FileSystemReader.read_data", side_effect=cause):
        with pytest.raises(told, match=str(cause.args[-1])):
            load_latest(tmp_path, engine)
        with pytest.raises(told, match=str(cause.args[-1])):
            read_weights(tmp_path)


@pytest.mark.parametrize("pointer", ["", "step_00000000", "nonsense"])
def test_a_pointer_to_nothing_never_hides_good_checkpoints(engine: Engine, tmp_path: Path, pointer: str) -> None:
    save_steps(tmp_path, engine, [1, 2])
    (tmp_path / "checkpoints/latest").write_text(pointer)
    restored = load_latest(tmp_path, engine)
    assert restored is not None
    assert restored.step == 2


def test_all_damaged_is_an_error(engine: Engine, tmp_path: Path) -> None:
    save_steps(tmp_path, engine, [1, 2])
    for file in tmp_path.glob("checkpoints/*/state.json"):
        file.unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        load_latest(tmp_path, engine)


def test_abandoned_later_checkpoints_go(engine: Engine, tmp_path: Path) -> None:
    save_steps(tmp_path, engine, [1, 9])
    (tmp_path / "checkpoints/step_00000009/state.json").unlink()
    save_steps(tmp_path, engine, [2])
    assert folders(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def test_another_model_is_refused(engine: Engine, tmp_path: Path) -> None:
    save_steps(tmp_path, engine, [1])
    logical = engine.logical_state()
    logical["master.first.bias"] = torch.zeros(7)
    other = mock.Mock(wraps=engine, layout=engine.layout, world_group=engine.world_group)
    other.logical_state.return_value = logical
    with pytest.raises(UserError, match=r"master\.first\.bias is \(6,\) there and \(7,\)"):
        load_latest(tmp_path, other)


MOMENTS = {  # function, and which of its calls
    "after the tensors": ("trainer.checkpoint.saving._describe_share", 1),
    "before the manifest": ("trainer.checkpoint.saving.write_durably", 1),
    "before the rename": ("trainer.checkpoint.saving.sync_folder", 1),
    "before the pointer": ("trainer.checkpoint.saving.sync_folder", 2),
}


def killed_while_saving(run_dir: Path, function: str, call: int) -> None:
    calls = itertools.count(1)

    def kill_this_process(*_: Any) -> None:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    engine = engine_on(0, 1, Case(1, 1))
    save_steps(run_dir, engine, [1])
    with mock.patch(function, side_effect=kill_this_process):
        save_steps(run_dir, engine, [2], keep_last=1)


def test_a_killed_save_leaves_the_checkpoint_before_it(engine: Engine, tmp_path: Path) -> None:
    forks = get_context("forkserver")  # imports once for all four
    forks.set_forkserver_preload(["trainer.checkpoint.reading", "tests.trainer.worlds"])
    run_dirs = [tmp_path / str(number) for number in range(len(MOMENTS))]
    processes = [
        forks.Process(target=killed_while_saving, args=(run_dir, *moment))
        for run_dir, moment in zip(run_dirs, MOMENTS.values(), strict=True)
    ]
    for process in processes:
        process.start()
    for process, run_dir in zip(processes, run_dirs, strict=True):
        process.join()
        assert process.exitcode == -signal.SIGKILL
        restored = load_latest(run_dir, engine)
        assert restored is not None
        assert (restored.step, restored.state, restored.damaged) == (1, {"step": 1}, ())
        save_steps(run_dir, engine, [2], keep_last=1)
        assert folders(run_dir) == ["latest", "step_00000002"], "what the killed save left is swept out"


def test_a_run_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    run_dir, message = tmp_path / "run", f"in use by another run .process {os.getpid()}"
    with lock_run(run_dir), pytest.raises(UserError, match=message), lock_run(run_dir):
        pass
    with lock_run(run_dir):
        pass


def test_file_systems_without_locks_can_be_used(tmp_path: Path) -> None:
    with (
        mock.patch("fcntl.flock", side_effect=OSError(errno.ENOSYS, "Function not implemented")),
        lock_run(tmp_path),
    ):
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another place"), lock_run(tmp_path / "file"):
        pass
