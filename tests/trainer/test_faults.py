"""Whole runs whose ranks are killed, stopped, signalled, spoiled or never start: none hangs, and one line says why."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest

from cluster.env import RankEnv, free_port
from cluster.exit_status import LOST_STATUS
from tests.trainer.loop_run import make_shards
from tests.trainer.noted_training import keys_of_steps
from tests.trainer.rank_processes import ends, lines_of, start_ranks, wait_for_step
from trainer.distributed.meeting import named

pytestmark = pytest.mark.faults

ENDLESS = ("train.steps=100000", "checkpoint.every_steps=3", "parallel.ep_size=2", "train.log_every_steps=1")
TIMEOUT_SECONDS = 12.0  # ranks that start on a busy machine are seconds apart
PAUSE_SECONDS = 4.0
QUICK = f"parallel.timeout_seconds={TIMEOUT_SECONDS}"
SPOILED = (sys.executable, "-m", "tests.trainer.spoiled_training")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return folder


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """A folder with shards, for a run of its own."""
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(shards / split)
    return tmp_path


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are killed when the test is over."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def spoken(said: list[str]) -> list[str]:
    """Return the lines that ranks wrote; none of them may come from gloo, torch or a traceback."""
    lines = [line for text in said for line in text.splitlines()]
    assert not any(word in line for line in lines for word in ("Traceback", "gloo", "c10d", "frame #")), lines
    return [line for line in lines if line.startswith(("error:", "interrupted"))]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(("ranks", "victims"), [(2, [0]), (2, [1]), (4, [0, 2])])
def test_when_ranks_are_killed_within_a_step_one_of_the_others_names_them(
    ranks: int, victims: list[int], folder: Path, started: list[subprocess.Popen[str]]
) -> None:
    started += start_ranks(folder, ranks, *ENDLESS)  # with a timeout of a minute
    wait_for_step(folder / "run", 4, started)
    for victim in victims:
        started[victim].kill()
    results = ends([process for rank, process in enumerate(started) if rank not in victims], seconds=40)
    assert [status for status, _ in results] == [LOST_STATUS] * (ranks - len(victims))
    (line,) = spoken([said for _, said in results])
    assert re.match(rf"error: rank \d lost {named(victims)} of {ranks} \(", line)
    assert line.endswith("the same command goes on from the last checkpoint")


def test_without_both_ranks_that_hold_a_store_the_others_end_too(
    folder: Path, started: list[subprocess.Popen[str]]
) -> None:
    started += start_ranks(folder, 4, *ENDLESS)
    wait_for_step(folder / "run", 4, started)
    started[0].kill()
    started[3].kill()
    results = ends(started[1:3], seconds=40)
    assert [status for status, _ in results] == [LOST_STATUS] * 2
    for line in spoken([said for _, said in results]):
        assert "lost the places where the ranks met (rank 0 or torchrun's agent, and rank 3)" in line


def test_a_slow_rank_is_waited_for_and_changes_no_number(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    runs = [folder / "undisturbed", folder / "slowed"]
    for run in runs:
        run.mkdir()
        for split in ("train", "val"):
            (run / split).symlink_to(folder / split)
        with mock.patch.dict(os.environ, STOP_AFTER="40"):
            started += start_ranks(run, 2, *ENDLESS)
    slow = started[2:]
    wait_for_step(runs[1] / "run", 3, slow)
    slow[1].send_signal(signal.SIGSTOP)
    time.sleep(PAUSE_SECONDS)
    slow[1].send_signal(signal.SIGCONT)
    assert [status for status, _ in ends(started)] == [143] * 4

    undisturbed, slowed = (lines_of(run / "run") for run in runs)
    assert [line["step"] for line in slowed] == list(range(1, 41))
    assert max(after["time"] - before["time"] for before, after in pairwise(slowed)) > PAUSE_SECONDS - 1
    times = {"time", "step_seconds", "data_wait_seconds"}
    for line, other in zip(slowed, undisturbed, strict=True):
        assert {key: line[key] for key in line.keys() - times} == {key: other[key] for key in other.keys() - times}


def test_a_rank_that_hangs_is_not_waited_for(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    started += start_ranks(folder, 2, *ENDLESS, QUICK)
    wait_for_step(folder / "run", 3, started)
    started[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    (status, said) = ends([started[0]], seconds=60)[0]
    assert TIMEOUT_SECONDS / 2 < time.monotonic() - stopped < TIMEOUT_SECONDS + 20
    assert status == LOST_STATUS
    (line,) = spoken([said])
    assert line.startswith("error: rank 0 lost rank 1 of 2 (Timed out")


def test_a_rank_that_does_not_start_is_named_once(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    started += start_ranks(folder, 3, QUICK, only=[0, 1])
    results = ends(started, seconds=60)
    assert [status for status, _ in results] == [2, 2]
    (line,) = spoken([said for _, said in results])
    assert "rank 2 of 3 did not come" in line


def test_torchrun_starts_ranks_again_which_go_on(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    command += [f"--master_port={free_port()}", "-m", "tests.trainer.noted_training", str(folder), *ENDLESS]
    launcher = subprocess.Popen(
        [*command, "train.steps=12"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    started.append(launcher)
    wait_for_step(folder / "run", 4, started)
    os.kill(child_with(launcher.pid, b"RANK=1"), signal.SIGKILL)
    ((status, said),) = ends(started)
    assert status == 0, said
    assert [line["step"] for line in lines_of(folder / "run")] == list(range(1, 13))
    assert len({file.name.split("_")[1] for file in (folder / "run").glob("keys_*")}) == 2, "two starts"


def child_with(parent: int, variable: bytes) -> int:
    """Return the child of a process whose environment holds a variable."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no child with {variable!r}")


def train_command(folder: Path, *overrides: str) -> list[str]:
    return ["-m", "trainer.cli", "train", "quickstart", f"run_dir={folder}/run", *overrides]


def test_torchrun_shows_a_mistake_once(folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = subprocess.run(
        [*command, *train_command(folder, "train.nonsense=1")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1
    assert "train.nonsense" in done.stderr


def test_a_mistake_that_one_rank_makes_ends_all_with_one_line(folder: Path) -> None:
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, *train_command(folder, *(["train.nonsense=1"] if rank else []))],
            env={**os.environ, **RankEnv(rank=rank, world=2, local_rank=rank, master_port=port).variables()},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = ends(processes)
    assert [status for status, _ in results] == [2, 2]
    (line,) = spoken([said for _, said in results])
    assert "train.nonsense" in line
    assert not (folder / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_one_rank_saves_at_a_boundary_and_ends_all_with_its_status(
    number: signal.Signals, folder: Path, started: list[subprocess.Popen[str]]
) -> None:
    started += start_ranks(folder, 2, *ENDLESS, "checkpoint.every_steps=50")
    wait_for_step(folder / "run", 2, started)
    started[1].send_signal(number)
    results = ends(started, seconds=60)
    assert [status for status, _ in results] == [128 + number] * 2
    (line,) = spoken([said for _, said in results])
    step = int(re.search(rf"interrupted by {number.name} after step (\d+); saved", line)[1])  # type: ignore[index]
    assert checkpoints(folder / "run")[-1] == f"step_{step:08d}"
    assert lines_of(folder / "run")[-1]["step"] == step

    longer = f"train.steps={step + 2}"
    started += (again := start_ranks(folder, 2, *ENDLESS, longer))
    assert [status for status, _ in ends(again)] == [0, 0]
    assert [line["step"] for line in lines_of(folder / "run")] == list(range(1, step + 3))
    assert sorted(keys_of_steps(folder / "run")) == list(range(1, step + 3))


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone_however_it_went(
    folder: Path, started: list[subprocess.Popen[str]]
) -> None:
    alone = ("train.steps=100000", "checkpoint.every_steps=3")
    started += start_ranks(folder, 1, *alone)
    wait_for_step(folder / "run", 3, started)
    started += (second := start_ranks(folder, 1, *alone))
    ((status, said),) = ends(second)
    assert status == 2
    assert f"in use by another run (process {started[0].pid} on " in spoken([said])[0]
    assert started[0].poll() is None
    started[0].kill()
    started[0].wait()
    started += (third := start_ranks(folder, 1, *alone, "train.steps=8"))
    assert ends(third)[0][0] == 0


def test_ranks_with_a_run_folder_each_end_at_the_start(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    places = [folder / "one", folder / "two"]
    for place in places:
        place.mkdir()
    started += start_ranks(folder, 2, "run_dir=run", working_folders=places)
    results = ends(started)
    assert [status for status, _ in results] == [2, 2]
    (line,) = spoken([said for _, said in results])
    assert f"rank 1 does not see what rank 0 writes to the run folder ({places[1]}/run on " in line
    assert not (places[1] / "run").exists()


def test_what_is_not_finite_on_one_rank_is_skipped_by_all_and_named_where_it_goes_on(folder: Path) -> None:
    """Rank 1 spoils the loss of step 3 and the gradient of step 5; from step 7 on every loss."""
    options = ("train.steps=20", "parallel.ep_size=2", "train.max_bad_steps=3", "checkpoint.every_steps=2")
    results = ends(start_ranks(folder, 2, *options, program=SPOILED))
    assert [status for status, _ in results] == [2, 2]
    (line,) = spoken([said for _, said in results])
    lines = lines_of(folder / "run")
    assert [entry["bad_steps"] for entry in lines] == [0, 0, 1, 1, 2, 2, 3, 4]
    norms = [entry["gradient_norm"] for entry in lines]
    assert [norm is None for norm in norms] == [False, False, True, False, True, False, True, True]
    assert "no finite gradient in 3 steps in a row, the last one step 9 (images 32 to 35 of the plan)" in line
    spoiled = json.loads((folder / "run" / "spoiled_1.json").read_text())
    assert re.search("samples ([^:]+):", line)[1].split(", ") == spoiled["9"]  # type: ignore[index]
