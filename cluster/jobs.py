"""What SLURM says about a job, with or without accounting, and how to end it."""

import shutil
import subprocess
from dataclasses import dataclass

from configs.errors import UserError

_ANSWER_SECONDS = 30.0
_FIELDS = 6
# All other states (squeue(1), "JOB STATE CODES") pass, such as SIGNALING, in which a job is that is being warned.
_OVER = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
        "UNKNOWN",
    ]
)


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job as SLURM knows it.

    Attributes:
        state: such as PENDING, RUNNING, COMPLETED, NODE_FAIL; UNKNOWN where nothing remembers the job.
        reason: why it is pending, or unknown; empty where that says nothing.
        nodes: where it runs or ran; empty before.
        elapsed: time that this start of it has run, as SLURM writes it.
        limit: its time limit.
        start: when it started, or is expected to.
    """

    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    limit: str = ""
    start: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it neither runs nor will."""
        return self.state in _OVER


def job_state(job_id: str) -> JobState:
    """Return the state of a job: from the controller's memory, else from accounting, else from its list of ended jobs.

    Raises:
        UserError: there is no SLURM here, or its controller does not answer.
    """
    # `-t all` shows ended jobs until the controller forgets them (MinJobAge, five minutes by default).
    asked = _run("squeue", "--noheader", "--array", "--states=all", f"--jobs={job_id}", "--format=%T|%r|%N|%M|%l|%S")
    if asked.returncode == 0 and asked.stdout.strip():
        state, reason, nodes, elapsed, limit, start = (asked.stdout.splitlines()[0].split("|") + [""] * _FIELDS)[
            :_FIELDS
        ]
        return JobState(
            state=state,
            reason="" if reason in ("None", "NonZeroExitCode") else reason,
            nodes=nodes,
            elapsed=elapsed,
            limit=limit,
            start="" if start == "N/A" else start,
        )
    if asked.returncode and "Invalid job id" not in asked.stderr:
        raise UserError(f"SLURM does not answer: {_last_line(asked.stderr)}")
    columns, problem = "--format=State,NodeList,Elapsed,Timelimit,Start", ""
    for source in ((), ("--completion",)):
        found = _run("sacct", *source, "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", columns)
        if found.returncode == 0 and found.stdout.strip():
            state, nodes, elapsed, limit, start = (found.stdout.splitlines()[-1].split("|") + [""] * _FIELDS)[:5]
            return JobState(state=state.split()[0], nodes=nodes, elapsed=elapsed, limit=limit, start=start)
        if found.returncode and "is disabled" not in found.stderr:
            problem = f"accounting does not answer: {_last_line(found.stderr)}"
    return JobState(state="UNKNOWN", reason=problem)


def cancel_job(job_id: str) -> None:
    """End a job now, without another try; what it did since its last checkpoint is lost.

    Raises:
        UserError: there is no SLURM here, or it refuses.
    """
    done = _run("scancel", job_id)
    if done.returncode:
        raise UserError(f"job {job_id} was not cancelled: {_last_line(done.stderr)}")


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(program) is None:
        raise UserError(f"there is no {program} here: ask on a machine of the SLURM cluster")
    try:
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"SLURM does not answer: {program} took longer than {_ANSWER_SECONDS:g} s") from None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
