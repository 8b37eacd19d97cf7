"""The loader's processes: they end with the trainer and not before, and what goes wrong in them is one line."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.shards import ShardIndex
from tests.data_pipeline.children import can_mount, run_with_mounts
from tests.data_pipeline.loading import SAMPLES, train_loader, write_three_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_three_shards(tmp_path_factory.mktemp("shards"))


def test_close_ends_the_workers(folder: Path) -> None:
    loader = train_loader(ShardIndex.load(folder), workers=2)
    batches = iter(loader)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert next(batches, None) is None
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_one_clear_line(folder: Path) -> None:
    batches = iter(train_loader(ShardIndex.load(folder), workers=1, steps=20))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(UserError, match="killed from outside, most likely for memory"):
        list(batches)


SHORT_OF_MEMORY = """
import subprocess, sys
from configs.tasks import resolve_tasks
from data_pipeline.loader import EvaluationLoader
from data_pipeline.shards import ShardIndex

if __name__ == "__main__":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"], check=True)
    tasks = resolve_tasks(["class_scene"])
    loader = EvaluationLoader(
        ShardIndex.load(sys.argv[1]), tasks, batch_size=8, rank=0, world=1, limit=None, workers=int(sys.argv[2])
    )
    print(sum(len(batch.keys) for batch in loader))
"""


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
@pytest.mark.parametrize("workers", [0, 1])
def test_too_little_shared_memory_is_an_error_and_no_wait_for_ever(folder: Path, tmp_path: Path, workers: int) -> None:
    done = run_with_mounts(tmp_path / "script.py", SHORT_OF_MEMORY, str(folder), str(workers))
    if workers:
        assert "UserError: no shared memory for a batch of 8 images" in done.stderr
    else:
        assert done.stdout == f"{SAMPLES}\n"


TRAINER = """
import signal, sys
from configs.schema import DataConfig
from configs.tasks import resolve_tasks
from data_pipeline.cursor import Cursor
from data_pipeline.loader import TrainLoader
from data_pipeline.shards import ShardIndex

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
    index = ShardIndex.load(sys.argv[1])
    loader = TrainLoader(
        index, DataConfig(workers=2), resolve_tasks(["depth_zbuffer"]), images_per_step=8, micro_batch=8, rank=0,
        world=1, seed=0, cursor=Cursor.start(index, 0), steps=10**6,
    )
    for batch in loader:
        print("batch", flush=True)
        if sys.stdin.readline() != "next\\n":
            break
"""


@pytest.fixture
def trainer(folder: Path, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process of its own session that prints a line per batch and goes on when told "next"."""
    script = tmp_path / "trainer_script.py"
    script.write_text(TRAINER)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    with process:
        yield process
        for pid in session_processes(process.pid):
            os.kill(pid, signal.SIGKILL)


def wait_for_the_end_of(session: int, seconds: float = 10) -> list[int]:
    """Return the processes of the session that are left after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while session_processes(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    return session_processes(session)


def test_workers_die_with_a_killed_trainer(trainer: "subprocess.Popen[str]") -> None:
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "batch\n"
    # The trainer, the fork server, its resource tracker, two workers.
    assert len(session_processes(trainer.pid)) == 5
    trainer.kill()
    trainer.wait()
    assert not wait_for_the_end_of(trainer.pid)


def test_workers_outlive_the_signals_of_a_scheduler(trainer: "subprocess.Popen[str]") -> None:
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "batch\n"
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
        os.killpg(trainer.pid, number)
    time.sleep(0.5)
    for _ in range(20):
        trainer.stdin.write("next\n")
        assert trainer.stdout.readline() == "batch\n"
    # Without `close`: the end of the program takes the workers along.
    trainer.stdin.write("stop\n")
    assert trainer.wait(timeout=30) == 0
    assert not wait_for_the_end_of(trainer.pid)


def session_processes(session: int) -> list[int]:
    """Ids of the running processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
        except OSError:
            continue
        if fields and fields[0] != "Z" and int(fields[3]) == session:
            found.append(int(entry.name))
    return found
