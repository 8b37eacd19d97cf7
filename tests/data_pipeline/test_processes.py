"""Spawned processes: every item once, faults told apart, none left behind."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.processes import run_in_processes
from tests.data_pipeline.children import await_no_process, start_script


def touch(folder: Path, item: int, on_step: Callable[[], None]) -> None:
    with (folder / f"{item}").open("x") as file:
        file.write(f"{os.getpid()}")
    time.sleep(0.05)
    on_step()
    on_step()


def note_threads(path: Path, item: int, on_step: Callable[[], None]) -> None:
    path.write_text(os.environ["OPENBLAS_NUM_THREADS"])


def step_once(item: int, on_step: Callable[[], None]) -> None:
    on_step()


def fail(how: str, item: int, on_step: Callable[[], None]) -> None:
    on_step()
    if item == 2:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("the shard is damaged") if how == "user" else ZeroDivisionError("a fault of ours")


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_item_is_done_once(tmp_path: Path, workers: int) -> None:
    steps: list[int] = []
    run_in_processes(partial(touch, tmp_path), range(4), workers, lambda: steps.append(1))
    assert len(steps) == 8
    processes = [path.read_text() for path in tmp_path.iterdir()]
    assert len(processes) == 4
    assert (str(os.getpid()) in processes) == (workers == 1)


def test_nothing_to_do() -> None:
    run_in_processes(partial(fail, "user"), [], 2, lambda: None)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("user", UserError, "^the shard is damaged$"),
        ("killed", UserError, "killed from outside"),
        ("fault", RuntimeError, r"(?s)test_processes\.py.*ZeroDivisionError: a fault of ours"),
    ],
)
def test_failures_are_told_apart(how: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        run_in_processes(partial(fail, how), range(4), 2, lambda: None)


def test_a_process_that_dies_between_two_items() -> None:
    def kill_workers() -> None:
        time.sleep(0.3)  # Until it has reported the item as done, and waits for the next.
        for process in multiprocessing.active_children():
            process.kill()
            process.join()

    with pytest.raises(UserError, match="killed from outside"):
        run_in_processes(step_once, range(9), 2, kill_workers)


def test_processes_share_the_cores_unless_the_user_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    run_in_processes(partial(note_threads, tmp_path / "a"), [0], 2, lambda: None)
    assert (tmp_path / "a").read_text() == "1"
    assert "OPENBLAS_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    run_in_processes(partial(note_threads, tmp_path / "b"), [0], 2, lambda: None)
    assert (tmp_path / "b").read_text() == "3"


_CHILD = """
import time
from functools import partial
from data_pipeline.processes import run_in_processes

def task(item, on_step):
    while True:
        time.sleep(0.05)
        on_step()

if __name__ == "__main__":
    run_in_processes(task, range(2), 2, partial(print, "step", flush=True))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_parent(tmp_path: Path, sent: signal.Signals) -> None:
    process = start_script(tmp_path / "child.py", _CHILD)
    assert process.stdout is not None
    assert process.stdout.readline() == "step\n"
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does: to all of them
    else:
        process.send_signal(sent)
    _, errors = process.communicate(timeout=20)
    await_no_process(process.pid)
    assert errors.count("KeyboardInterrupt") == (1 if sent == signal.SIGINT else 0)
