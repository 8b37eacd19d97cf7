"""A real SLURM takes a job's nodes away, at its time limit and for a job of higher priority; training goes on."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.launch import Run, submit
from configs.launch import LaunchConfig
from configs.load import dump_config
from tests.services.slurm import running_slurm, wait_for_job
from tests.services.waiting import wait_until
from tests.trainer.loop_run import loop_config, make_shards
from trainer.run_files import read_steps

pytestmark = pytest.mark.faults

# Two nodes of four cores each, all of them.
ALL_CORES = LaunchConfig(nodes=2, cpus_per_rank=4, time="20")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return folder


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    with running_slurm() as folder:
        yield folder


def slow_run(shards: Path, name: str, steps: int) -> Run:
    """A run whose steps take a while: many forward passes each."""
    run_dir = shards / name
    slow = ("train.images_per_step=32", "train.micro_batch=2", "checkpoint.every_steps=1000")
    return Run(run_dir, dump_config(loop_config(shards, f"run_dir={run_dir}", f"train.steps={steps}", *slow)))


def logs(run: Run) -> str:
    return "\n".join(path.read_text() for path in sorted((run.run_dir / "slurm").glob("*_log.*")))


def reached(run: Run, step: int) -> bool:
    lines = read_steps(run.run_dir)
    return bool(lines) and lines[-1].step >= step


def test_a_preempted_job_gives_its_nodes_up_and_goes_on_later(slurm: Path, shards: Path) -> None:
    run = slow_run(shards, "preempted", 40)
    (record,) = submit([run], ALL_CORES.model_copy(update={"partition": "scavenge"}), run.run_dir / "slurm")
    wait_until(lambda: reached(run, 2), 120, "two steps")
    urgent = subprocess.run(
        ["srun", "--partition=normal", "--nodes=2", "--exclusive", "sleep", "1"], capture_output=True, check=False
    )
    assert urgent.returncode == 0, "the job of higher priority got the nodes"
    assert wait_for_job(record.job_id, 200).state == "COMPLETED", logs(run)
    assert "interrupted by SIG" in logs(run)
    assert [line.step for line in read_steps(run.run_dir)] == list(range(1, 41))


def test_a_job_goes_on_behind_its_time_limit(slurm: Path, shards: Path) -> None:
    run = slow_run(shards, "limited", 600)
    launch = LaunchConfig(cpus_per_rank=1, time="2", grace_seconds=10, max_requeues=20)
    (record,) = submit([run], launch, run.run_dir / "slurm")
    wait_until(lambda: "back into the queue, restart 1" in logs(run), 200, "a restart")
    assert "interrupted by SIGUSR2" in logs(run)
    before = read_steps(run.run_dir)[-1].step
    wait_until(lambda: reached(run, before + 3), 120, "more steps")
    subprocess.run(["scancel", record.job_id], check=True)
    steps = [line.step for line in read_steps(run.run_dir)]
    assert steps == list(range(1, len(steps) + 1)), "no step is missing, none was done twice"
