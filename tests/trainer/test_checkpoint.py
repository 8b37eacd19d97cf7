import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from tests.ranks import run_ranks
from tests.trainer.test_engine import Case, engine_on, step_once, whole_state
from tests.trainer.toy_model import toy_batches

BATCHES = toy_batches(4, 16)
LOOP_STATE = {"cursor": {"position": 7}, "ema": [torch.arange(3.0), None], "rng": torch.arange(9, dtype=torch.uint8)}
SAME_LAYOUT = [Case(2, 0), Case(2, 1), Case(2, 2), Case(1, 1), Case(2, 0, dtype="bf16"), Case(2, 1, dtype="bf16")]
WRITER = Case(2, 1, clip_norm=0.05)  # on four ranks
READERS = [Case(2, 2, clip_norm=0.05), Case(1, 0, clip_norm=0.05), Case(2, 0, clip_norm=0.05)]  # on two


def train(engine: Any, batches: list[tuple[Tensor, Tensor]], rank: int, world: int) -> None:
    for batch in batches:
        engine.set_learning_rate(0.03)
        assert not step_once(engine, batch, rank, world).skipped


def fresh(rank: int, world: int, case: Case) -> Any:
    """An engine whose every number differs from any other's."""
    engine = engine_on(rank, world, case)
    engine.load_logical_state({name: value + torch.rand(()) for name, value in engine.logical_state().items()})
    return engine


def save_and_go_on(rank: int, world: int, case: Case, run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train two steps, save, train two more; return both states."""
    from trainer.checkpoint import save

    engine = engine_on(rank, world, case)
    train(engine, BATCHES[:2], rank, world)
    save(run_dir, engine, step=2, state=LOOP_STATE, keep_last=2)
    saved = whole_state(engine)
    train(engine, BATCHES[2:], rank, world)
    done = whole_state(engine)
    engine.close()
    return saved, done


def resume(rank: int, world: int, case: Case, run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load what `save_and_go_on` saved, train the other two steps; return both states."""
    from trainer.checkpoint import load_latest

    engine = fresh(rank, world, case)
    restored = load_latest(run_dir, engine)
    assert restored is not None
    assert (restored.step, restored.damaged) == (2, ())
    torch.testing.assert_close(restored.state, LOOP_STATE, rtol=0, atol=0)
    loaded = whole_state(engine)
    train(engine, BATCHES[2:], rank, world)
    done = whole_state(engine)
    engine.close()
    return loaded, done


def on_four_ranks(rank: int, world: int, run_dir: Path) -> Any:
    return save_and_go_on(rank, world, WRITER, run_dir)


def on_two_ranks(rank: int, world: int, from_four: Path, folder: Path, small_disk: Path | None) -> Any:
    same = []
    for number, case in enumerate(SAME_LAYOUT):
        run_dir = folder / f"run_{number}"
        same.append((save_and_go_on(rank, world, case, run_dir), resume(rank, world, case, run_dir)))
    others = [resume(rank, world, case, from_four) for case in READERS]
    return {"same": same, "others": others, "full_disk": small_disk and fill_disk(rank, world, small_disk)}


def fill_disk(rank: int, world: int, run_dir: Path) -> str:
    """Save once, fill the disk, try again; return the error."""
    from trainer.checkpoint import load_latest, save

    engine = engine_on(rank, world, Case(2, 1))
    save(run_dir, engine, step=1, state={}, keep_last=1)
    if rank == 0:
        free = shutil.disk_usage(run_dir).free
        (run_dir / "ballast").write_bytes(bytes(free - 12 * 1024))
    train(engine, BATCHES[:1], rank, world)
    with pytest.raises(UserError) as caught:
        save(run_dir, engine, step=2, state={}, keep_last=1)
    restored = load_latest(run_dir, engine)
    assert restored is not None
    assert (restored.step, restored.damaged) == (1, ())
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    engine.close()
    return str(caught.value)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of 1 MB, where this process may mount one."""
    folder = tmp_path_factory.mktemp("small_disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, small_disk: Path | None) -> dict[str, Any]:
    """What four ranks saved, and two ranks saved and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    four = run_ranks(on_four_ranks, 4, folder / "four")
    two = run_ranks(on_two_ranks, 2, folder / "four", folder, small_disk)
    return {"folder": folder, "four": four[0], "two": two}


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as a world of one, without a launcher."""
    from trainer.engine import close_distributed

    with mock.patch.dict(os.environ):
        yield
        close_distributed()


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        atol = tolerance * value.abs().max().item()
        torch.testing.assert_close(state[name], value, rtol=tolerance, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_resume_on_the_same_layout_is_bit_identical(layouts: dict[str, Any]) -> None:
    for rank in layouts["two"]:
        for (saved, done), (loaded, resumed) in rank["same"]:
            assert_equal(loaded, saved)
            assert_equal(resumed, done)


def test_two_ranks_resume_what_four_saved(layouts: dict[str, Any]) -> None:
    """Other world, other ep_size, other ZeRO stage: the same numbers, and the same training from there."""
    saved, done = layouts["four"]
    for rank in layouts["two"]:
        for loaded, resumed in rank["others"]:
            assert_equal(loaded, saved)
            assert_equal(resumed, done, 1e-6)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_process_resumes_what_four_ranks_saved(layouts: dict[str, Any], stage: int) -> None:
    saved, done = layouts["four"]
    loaded, resumed = resume(0, 1, Case(1, stage, clip_norm=0.05), layouts["folder"] / "four")
    assert_equal(loaded, saved)
    assert_equal(resumed, done, 1e-6)


def test_weights_are_read_without_an_engine(layouts: dict[str, Any]) -> None:
    from trainer.checkpoint import read_weights

    step, weights = read_weights(layouts["folder"] / "four")
    saved, _ = layouts["four"]
    assert step == 2
    assert_equal(weights, {name[7:]: value for name, value in saved.items() if name.startswith("master.")})


def test_full_disk_is_one_error_on_all_ranks_and_leaves_the_last_checkpoint(
    layouts: dict[str, Any], small_disk: Path | None
) -> None:
    if small_disk is None:
        pytest.skip("this user may not mount a tmpfs")
    errors = [rank["full_disk"] for rank in layouts["two"]]
    assert errors[0] == errors[1]
    assert "\n" not in errors[0]
    assert "free some space" in errors[0]


@pytest.fixture
def engine(alone: None) -> Iterator[Any]:
    engine = engine_on(0, 1, Case(1, 1))
    yield engine
    engine.close()


def save_steps(run_dir: Path, engine: Any, steps: list[int], keep_last: int = 2) -> None:
    from trainer.checkpoint import save

    for step in steps:
        save(run_dir, engine, step=step, state={"step": step}, keep_last=keep_last)


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_no_checkpoint_is_none(engine: Any, tmp_path: Path) -> None:
    from trainer.checkpoint import load_latest, read_weights

    assert load_latest(tmp_path, engine) is None
    with pytest.raises(UserError, match="has no intact checkpoint: train it first"):
        read_weights(tmp_path)


def test_only_the_last_are_kept(engine: Any, tmp_path: Path) -> None:
    save_steps(tmp_path, engine, [1, 5, 12], keep_last=2)
    assert folders(tmp_path) == ["latest", "step_00000005", "step_00000012"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000012\n"
    manifest = json.loads((tmp_path / "checkpoints/step_00000012/manifest.json").read_text())
    assert (manifest["step"], manifest["world"], manifest["ep_size"], manifest["zero_stage"]) == (12, 1, 1, 1)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest", "no_manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_named(engine: Any, tmp_path: Path, damage: str) -> None:
    from trainer.checkpoint import load_latest

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


def test_all_damaged_is_an_error(engine: Any, tmp_path: Path) -> None:
    from trainer.checkpoint import load_latest

    save_steps(tmp_path, engine, [1, 2])
    for file in tmp_path.glob("checkpoints/*/state.json"):
        file.unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        load_latest(tmp_path, engine)


def test_abandoned_later_checkpoints_go(engine: Any, tmp_path: Path) -> None:
    save_steps(tmp_path, engine, [1, 9])
    (tmp_path / "checkpoints/step_00000009/state.json").unlink()
    save_steps(tmp_path, engine, [2])
    assert folders(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def test_another_model_is_refused(engine: Any, tmp_path: Path) -> None:
    from trainer.checkpoint import load_latest

    save_steps(tmp_path, engine, [1])
    logical = engine.logical_state()
    logical["master.first.bias"] = torch.zeros(7)
    other = mock.Mock(wraps=engine, layout=engine.layout, world_group=engine.world_group)
    other.logical_state.return_value = logical
    with pytest.raises(UserError, match=r"master\.first\.bias is \(6,\) there and \(7,\)"):
        load_latest(tmp_path, other)


MOMENTS = {
    "after the tensors": "trainer.checkpoint._describe_share",
    "before the manifest": "trainer.checkpoint.write_durably",
    "before the rename": "trainer.checkpoint.sync_folder",
    "before the pointer": "trainer.checkpoint.write_text_atomically",
}


def kill_this_process(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_saving(run_dir: Path, function: str) -> None:
    engine = engine_on(0, 1, Case(1, 1))
    save_steps(run_dir, engine, [1])
    with mock.patch(function, side_effect=kill_this_process):
        save_steps(run_dir, engine, [2], keep_last=1)


def test_a_killed_save_leaves_the_checkpoint_before_it(engine: Any, tmp_path: Path) -> None:
    from trainer.checkpoint import load_latest

    forks = get_context("forkserver")  # imports once for all four
    forks.set_forkserver_preload(["trainer.checkpoint", "tests.trainer.test_engine"])
    run_dirs = [tmp_path / str(number) for number in range(len(MOMENTS))]
    processes = [
        forks.Process(target=killed_while_saving, args=arguments)
        for arguments in zip(run_dirs, MOMENTS.values(), strict=True)
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
    from trainer.checkpoint import lock_run

    run_dir, message = tmp_path / "run", f"in use by another run .process {os.getpid()}"
    with lock_run(run_dir), pytest.raises(UserError, match=message), lock_run(run_dir):
        pass
    with lock_run(run_dir):
        pass


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    from trainer.checkpoint import lock_run

    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another run_dir"), lock_run(tmp_path / "file"):
        pass
