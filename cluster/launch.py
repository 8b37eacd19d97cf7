"""Runs as SLURM jobs, through submitit: one rank per GPU, the code as it is now, and another try where it is worth one.

The batch script starts the ranks with srun. When they leave because they were warned (time limit, preemption), because
a rank was lost or killed, it puts the job back into the queue under the same number, at most `max_requeues` times; the
run then goes on from its last checkpoint. This happens in the batch script since `scontrol` is missing in containers.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from cluster.env import SLURM_PORTS, import_variables
from cluster.exit_status import RETRIED
from cluster.local import run_ranks
from cluster.snapshot import snapshot_code
from cluster.worker import FAILED_FILE_VARIABLE, TRAIN_ENTRY, TrainJob
from configs.atomic import cannot_write, write_text_atomically
from configs.errors import UserError
from configs.launch import LaunchConfig, minutes_of

SLURM_FOLDER = "slurm"
JOB_FILE = "job.json"
_STOPPED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2))


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """What a run folder keeps of the job that it was last submitted as.

    Attributes:
        job_id: SLURM's number; NUMBER_INDEX for one run of a sweep.
        folder: where submitit keeps scripts and logs.
        ranks: number of ranks.
        submitted: seconds since 1970.
    """

    job_id: str
    folder: str
    ranks: int
    submitted: float

    def log(self, rank: int, stream: str = "out") -> Path:
        """Return the log of a rank: what it wrote to standard output ("out") or error ("err")."""
        return Path(self.folder) / f"{self.job_id}_{rank}_log.{stream}"


@dataclass(frozen=True)
class Run:
    """One run to submit.

    Attributes:
        run_dir: its folder.
        config: text of its resolved configuration.
        entry: what every rank of a job runs, see `cluster.worker.TrainJob`.
    """

    run_dir: Path
    config: str
    entry: str = TRAIN_ENTRY


def sbatch_script(runs: Sequence[Run], launch: LaunchConfig, folder: Path) -> str:
    """Return the batch script that `submit` would hand to sbatch; writes nothing."""
    executor = _executor(launch, folder, folder / "code", _name(runs, folder))
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    return text


def submit(runs: Sequence[Run], launch: LaunchConfig, folder: Path) -> list[JobRecord]:
    """Submit runs, several as one job array, and note in each run folder what it was submitted as.

    Args:
        runs: at least one.
        launch: what to ask for.
        folder: receives scripts, logs and the copy of the code; every node must see it under this path.

    Raises:
        UserError: no SLURM here, sbatch refuses, or the folder cannot be written.
    """
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: launch on a login node of a SLURM cluster, or with --local")
    executor = _executor(launch, folder, snapshot_code(_made(folder)), _name(runs, folder))
    jobs = [TrainJob(str(_write_config(run, folder)), run.entry) for run in runs]
    try:
        if len(jobs) == 1:
            submitted = [executor.submit(jobs[0])]
        else:
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, subprocess.CalledProcessError) as error:
        raise UserError(f"sbatch refused the job: {_reason(error)}") from None
    return [_note(run, job, launch, folder) for run, job in zip(runs, submitted, strict=True)]


def run_locally(command: Sequence[str], runs: Sequence[Run], launch: LaunchConfig, folder: Path) -> int:
    """Run the same ranks on this machine, one run after the other, without queue, time limit and further tries.

    Rank 0 writes to the terminal, the others to `rank_N.log` in RUN/slurm. A signal is passed on to the ranks, as
    `cluster.local.run_ranks` says, and no further run is begun.

    Args:
        command: program and arguments of a rank; the path of the configuration follows.
        runs: at least one.
        launch: how many ranks, and the lines before them.
        folder: receives the configurations and the copy of the code.

    Returns:
        0 when all runs succeed, else the largest status of a run; 128 + signal after a signal.

    Raises:
        UserError: more than one node is asked for, a folder cannot be written, or the lines before the ranks end it.
    """
    if launch.nodes > 1:
        raise UserError(f"--local has one node, not {launch.nodes}: leave --nodes out")
    variables = import_variables(snapshot_code(_made(folder)).resolve())
    if not launch.gpus_per_node:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if launch.setup:
        variables = _environment_after(launch.setup, variables)
    worst = 0
    for run in runs:
        config = str(_write_config(run, folder))
        status = run_ranks([*command, config], launch.ranks, run.run_dir / SLURM_FOLDER, variables)
        if status in _STOPPED:
            return status
        worst = max(worst, status)
    return worst


def read_job(run_dir: Path) -> JobRecord:
    """Return what the run was last submitted as.

    Raises:
        UserError: it was not launched, or the note is damaged.
    """
    path = run_dir / SLURM_FOLDER / JOB_FILE
    try:
        return JobRecord(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{run_dir} was not launched as a job: it has no {SLURM_FOLDER}/{JOB_FILE}") from None
    except (ValueError, TypeError, OSError):
        raise UserError(f"{path} is damaged: launch the run again") from None


class _AnywhereExecutor(submitit.SlurmExecutor):  # type: ignore[misc]  # submitit has no types
    """submitit's, which a script can be made with where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _executor(launch: LaunchConfig, folder: Path, code: Path, name: str) -> submitit.SlurmExecutor:
    executor = _AnywhereExecutor(folder, python=launch.python and shlex.quote(launch.python))
    srun = ["--kill-on-bad-exit=1"]  # the ranks that are left would wait for one that is gone
    if launch.container_image:
        mounts = [*launch.container_mounts, f"{folder.parent}:{folder.parent}"]
        srun += [f"--container-image={launch.container_image}", f"--container-mounts={','.join(mounts)}"]
    executor.update_parameters(
        job_name=name,
        nodes=launch.nodes,
        ntasks_per_node=launch.ranks,
        cpus_per_task=launch.cpus_per_rank,
        gpus_per_node=launch.gpus_per_node or None,
        mem=launch.mem_gb and f"{launch.mem_gb}G",
        time=minutes_of(launch.time),
        partition=launch.partition,
        account=launch.account,
        qos=launch.qos,
        constraint=launch.constraint,
        exclude=launch.exclude,
        signal_delay_s=launch.grace_seconds,
        array_parallelism=launch.array_parallelism,
        srun_args=srun,
        setup=[*_environment(folder, code), *launch.setup],
        teardown=_requeue_lines(launch.max_requeues),
        additional_parameters={"requeue": True, **launch.slurm},
    )
    return executor


def _environment(folder: Path, code: Path) -> list[str]:
    """Return the lines that set what every rank finds in its environment."""
    return [
        _python_path(code),
        # sbatch passes on the environment of whoever submits, who may be a rank of another run.
        "unset RANK WORLD_SIZE LOCAL_RANK MASTER_PORT",
        f'export {FAILED_FILE_VARIABLE}={shlex.quote(str(folder.resolve()))}/"$SLURM_JOB_ID"_failed',
        f'rm -f "${FAILED_FILE_VARIABLE}"',
        # Ranks wait for minutes, without a word, for a name that they cannot resolve. SLURM knows an address.
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "address=$(scontrol show node \"$first\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')",
        "MASTER_ADDR=$(getent ahostsv4 \"${address:-$first}\" | awk 'NR == 1 {print $1}')",
        'export MASTER_ADDR="${MASTER_ADDR:-$first}"',
        # This script runs on the first node, where rank 0 will listen: a port that nobody answers at.
        f"MASTER_PORT=$(({SLURM_PORTS.start} + SLURM_JOB_ID % {len(SLURM_PORTS)}))",
        'while (: </dev/tcp/127.0.0.1/"$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done',
        "export MASTER_PORT",
        # Since SLURM 22.05 srun takes the cores of a task from here alone.
        'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
    ]


def _python_path(code: Path) -> str:
    # Without the first, `python -m` would look where the job was submitted before anywhere else: often beside the code.
    return f'export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code.resolve()))}"${{PYTHONPATH:+:$PYTHONPATH}}"'


def _requeue_lines(max_requeues: int) -> list[str]:
    """Return the lines after srun: put the job back into the queue if its status asks for it."""
    # One element of an array has the number of the whole array, which SLURM would start again with it.
    job = '"${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"'
    pattern = " | ".join(str(status) for status in sorted(RETRIED))
    return [
        "status=$?",
        f'if [ -s "${FAILED_FILE_VARIABLE}" ]; then exit "$(cat "${FAILED_FILE_VARIABLE}")"; fi',
        'case "$status" in',
        f"  {pattern})",
        f'    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then',
        '      echo "status $status: back into the queue, restart $((${SLURM_RESTART_COUNT:-0} + 1))"',
        f"      scontrol requeue {job} && sleep 60",  # the requeue ends this script
        "    else",
        f'      echo "status $status after {max_requeues} restarts: not put back into the queue (max_requeues)"',
        "    fi;;",
        "esac",
        'exit "$status"',
    ]


def _environment_after(setup: Sequence[str], variables: Mapping[str, str]) -> dict[str, str]:
    """Run shell lines once, with further `variables`; return the whole environment that they leave."""
    with tempfile.NamedTemporaryFile() as file:
        lines = [*setup, f"env -0 >{shlex.quote(file.name)}"]
        done = subprocess.run(["bash", "-c", "\n".join(lines)], env={**os.environ, **variables}, check=False)
        left = os.fsdecode(file.read())
    if not left:
        raise UserError(f"the lines of setup ended their shell with status {done.returncode}: no rank was started")
    return dict(pair.split("=", 1) for pair in left.rstrip("\0").split("\0"))


def _name(runs: Sequence[Run], folder: Path) -> str:
    return f"modsquad-{runs[0].run_dir.name if len(runs) == 1 else folder.parent.name}"


def _write_config(run: Run, folder: Path) -> Path:
    digest = hashlib.sha256(run.config.encode()).hexdigest()  # another configuration never takes the place of this one
    path = folder / f"config-{run.run_dir.name}-{digest[:12]}.yaml"
    write_text_atomically(path, run.config)
    return path.resolve()


def _note(run: Run, job: submitit.Job[str], launch: LaunchConfig, folder: Path) -> JobRecord:
    record = JobRecord(
        job_id=job.job_id,
        folder=str(folder.resolve()),
        ranks=launch.nodes * launch.ranks,
        submitted=time.time(),
    )
    write_text_atomically(run.run_dir / SLURM_FOLDER / JOB_FILE, json.dumps(asdict(record)) + "\n")
    return record


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return folder


def _reason(error: Exception) -> str:
    """Return sbatch's own words, as one line."""
    lines = [line.partition("error: ")[2] for line in str(error).splitlines() if "error: " in line]
    return "; ".join(dict.fromkeys(lines)) or (str(error).splitlines() or [repr(error)])[-1]
