"""A real SLURM takes a job away, at its time limit and for a job of higher priority: training goes on as if not."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from cluster.launch import JobRecord, Run, submit
from configs.launch import LaunchConfig
from configs.load import dump_config
from tests.cluster.paced_training import ENTRY
from tests.services.slurm import running_slurm, wait_for_job
from tests.services.waiting import wait_until
from tests.trainer.loop_run import loop_config, make_shards
from tests.trainer.rank_processes import lines_of

pytestmark = pytest.mark.faults

STEPS = 40
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


def submit_run(shards: Path, name: str, launch: LaunchConfig, pace_seconds: float) -> tuple[Run, JobRecord]:
    """Submit a run that saves no checkpoint by itself, and whose steps take a while until the job is started again."""
    run_dir = shards / name
    options = (f"run_dir={run_dir}", f"train.steps={STEPS}", "checkpoint.every_steps=1000")
    run = Run(run_dir, dump_config(loop_config(shards, *options)), ENTRY)
    # sbatch hands these on.
    with mock.patch.dict(os.environ, PACE_SECONDS=str(pace_seconds), PYTHONPATH=str(Path(__file__).parents[2])):
        (record,) = submit([run], launch, run_dir / "slurm")
    return run, record


@pytest.fixture(scope="module")
def undisturbed(slurm: Path, shards: Path) -> Path:
    """The folder of a run on two nodes that nothing happened to."""
    run, record = submit_run(shards, "undisturbed", ALL_CORES, pace_seconds=0.0)
    assert wait_for_job(record.job_id).state == "COMPLETED", logs(run)
    return run.run_dir


def logs(run: Run) -> str:
    return "\n".join(path.read_text() for path in sorted((run.run_dir / "slurm").glob("*_log.*")))


def assert_same_training(run_dir: Path, undisturbed: Path) -> None:
    """Every line and both evaluations are those of the other run, to the last bit, but for times."""
    ours, theirs = lines_of(run_dir), lines_of(undisturbed)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1)), "no step is missing, none was done twice"
    times = {"time", "step_seconds", "data_wait_seconds"}
    for line, other in zip(ours, theirs, strict=True):
        assert {key: value for key, value in line.items() if key not in times} == {
            key: value for key, value in other.items() if key not in times
        }
    evaluation = Path("evaluation", f"step_{STEPS:08d}_val.json")
    assert (run_dir / evaluation).read_text() == (undisturbed / evaluation).read_text()


def test_a_preempted_job_gives_its_nodes_up_and_goes_on_later(undisturbed: Path, shards: Path) -> None:
    scavenge = ALL_CORES.model_copy(update={"partition": "scavenge"})
    run, record = submit_run(shards, "preempted", scavenge, pace_seconds=1.0)
    wait_until(lambda: len(lines_of(run.run_dir)) >= 2, 120, "two steps")
    urgent = subprocess.run(
        ["srun", "--partition=normal", "--nodes=2", "--exclusive", "sleep", "1"], capture_output=True, check=False
    )
    assert urgent.returncode == 0, "the job of higher priority got the nodes"
    assert wait_for_job(record.job_id, 200).state == "COMPLETED", logs(run)
    assert "interrupted by SIG" in logs(run)
    assert_same_training(run.run_dir, undisturbed)


def test_a_job_goes_on_behind_its_time_limit(undisturbed: Path, shards: Path) -> None:
    # SLURM warns up to a minute early, so 50 to 110 seconds after the start: before these steps are done.
    limited = ALL_CORES.model_copy(update={"time": "2", "grace_seconds": 10})
    run, record = submit_run(shards, "limited", limited, pace_seconds=3.0)
    assert wait_for_job(record.job_id, 240).state == "COMPLETED", logs(run)
    assert "interrupted by SIGUSR2" in logs(run)
    assert "back into the queue, restart 1" in logs(run)
    assert_same_training(run.run_dir, undisturbed)
