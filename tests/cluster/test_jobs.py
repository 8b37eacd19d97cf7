"""What a real SLURM with accounting says of jobs that its controller has forgotten."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.jobs import JobState, job_state
from cluster.launch import JobRecord
from tests.services.slurm import running_slurm
from tests.services.waiting import wait_until

pytestmark = pytest.mark.faults

WAITS = "[ $SLURM_RESTART_COUNT ] || exec sleep 300"  # until it is started again
EXPECTED = {
    "completed": "COMPLETED",
    "failed": "FAILED",
    "cancelled": "CANCELLED",
    "timed out": "TIMEOUT",
    "preempted": "PREEMPTED",
    "preempted, then completed": "COMPLETED",
    "requeued, then failed": "FAILED",
    "lost its node": "NODE_FAIL",
    "array 0": "COMPLETED",
    "array 1": "FAILED",
    "array 2": "CANCELLED",
}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    with running_slurm(accounting=True) as folder:
        yield folder


def sbatch(script: str, *options: str) -> str:
    command = ["sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def scontrol(*arguments: str) -> None:
    subprocess.run(["scontrol", *arguments], check=True)


def wait_for_state(job_id: str, state: str) -> None:
    wait_until(lambda: job_state(job_id).state == state, 60, f"job {job_id} is {state}, not {job_state(job_id)}")


@pytest.fixture(scope="module")
def jobs(slurm: Path) -> dict[str, str]:
    """The numbers of jobs that are over, each in its way, and forgotten by the controller."""
    both = ("--nodes=2", "--exclusive", "--partition=spot")
    found = {"preempted": sbatch(WAITS, *both, "--no-requeue")}
    wait_for_state(found["preempted"], "RUNNING")
    found["preempted, then completed"] = sbatch(WAITS, *both, "--requeue")  # takes the nodes when the first has gone
    for name in ("preempted", "preempted, then completed"):
        wait_for_state(found[name], "RUNNING")
        subprocess.run(["srun", "--nodes=2", "--exclusive", "--quiet", "true"], check=True)

    found |= {
        "completed": sbatch("true"),
        "failed": sbatch("exit 3"),
        "cancelled": sbatch(WAITS),
        "timed out": sbatch(WAITS, "--time=5"),
        "requeued, then failed": sbatch(f"{WAITS}; exit 4", "--requeue"),
        "lost its node": sbatch(WAITS, "--nodelist=node2", "--no-requeue"),
    }
    array = sbatch("[ $SLURM_ARRAY_TASK_ID = 2 ] && sleep 300; exit $SLURM_ARRAY_TASK_ID", "--array=0-2")
    found |= {f"array {index}": f"{array}_{index}" for index in range(3)}
    for name in ("cancelled", "timed out", "requeued, then failed", "lost its node", "array 2"):
        wait_for_state(found[name], "RUNNING")
    scontrol("update", f"jobid={found['timed out']}", "endtime=now+1")
    scontrol("requeue", found["requeued, then failed"])
    assert not job_state(found["requeued, then failed"]).is_over
    subprocess.run(["scancel", found["cancelled"], found["array 2"]], check=True)
    scontrol("update", "nodename=node2", "state=down", "reason=test")
    # Refused where the node has come back by itself (ReturnToService=2).
    subprocess.run(["scontrol", "update", "nodename=node2", "state=resume"], capture_output=True, check=False)
    for name, job_id in found.items():
        wait_until(lambda job_id=job_id: is_forgotten(job_id), 120, f"job {job_id} ({name}) is over and forgotten")
    return found


def is_forgotten(job_id: str) -> bool:
    shown = subprocess.run(
        ["squeue", "--noheader", "--states=all", f"--jobs={job_id}"], capture_output=True, text=True, check=False
    )
    return not shown.stdout.strip()


def test_forgotten_jobs_are_found_in_accounting(jobs: dict[str, str]) -> None:
    assert jobs.keys() == EXPECTED.keys()
    states = {name: job_state(job_id) for name, job_id in jobs.items()}
    assert {name: state.state for name, state in states.items()} == EXPECTED
    assert all(state.is_over for state in states.values())
    assert states["preempted, then completed"].nodes == "node[1-2]"
    assert states["timed out"].limit == "00:01:00"
    assert all(state.elapsed and state.start.startswith("20") for state in states.values())


def test_the_status_command_shows_them(jobs: dict[str, str], tmp_path: Path) -> None:
    for name, job_id in jobs.items():
        (tmp_path / name / "slurm").mkdir(parents=True)
        record = JobRecord(job_id=job_id, folder=str(tmp_path / name / "slurm"), ranks=1, submitted=0.0)
        (tmp_path / name / "slurm" / "job.json").write_text(json.dumps(asdict(record)))
    shown = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "status", *(str(tmp_path / name) for name in jobs)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in shown.stdout.splitlines() if "│" in line]
    assert rows == [[name, job_id, EXPECTED[name].lower()] for name, job_id in jobs.items()]


def test_a_job_that_accounting_does_not_know_is_unknown(jobs: dict[str, str]) -> None:
    assert job_state("999999") == JobState(state="UNKNOWN")
    assert JobState(state="UNKNOWN").is_over


@pytest.mark.parametrize(
    ("state", "over"),
    [("SIGNALING", False), ("COMPLETING", False), ("REQUEUE_HOLD", False), ("TIMEOUT", True), ("OUT_OF_MEMORY", True)],
)
def test_a_job_that_is_warned_or_held_is_not_over(state: str, over: bool) -> None:
    assert JobState(state=state).is_over == over


def test_accounting_that_does_not_answer_is_named(slurm: Path, jobs: dict[str, str]) -> None:
    os.kill(int((slurm / "slurmdbd.pid").read_text()), signal.SIGKILL)
    state = job_state(jobs["completed"])
    assert state.state == "UNKNOWN"
    assert state.reason.startswith("accounting does not answer: ")
    assert "Connection refused" in state.reason
