"""A real SLURM of two nodes on this machine."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.jobs import JobState, job_state
from tests.services.programs import need_programs
from tests.services.waiting import wait_until

_SCRIPT = Path(__file__).with_suffix(".sh")
_PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
_ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server-core"}


@contextmanager
def running_slurm(*, accounting: bool = False) -> Iterator[Path]:
    """Start it, point SLURM's commands to it, and stop it afterwards; yield its folder.

    With `accounting` the controller forgets ended jobs within seconds, and slurmdbd alone knows them.
    """
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    need_programs({**_PROGRAMS, **_ACCOUNTING} if accounting else _PROGRAMS)
    # Not pytest's folder: paths of sockets are short, and daemons outlive a test that is killed.
    folder = Path(tempfile.mkdtemp(prefix="modsquad-slurm-"))
    previous = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        subprocess.run(["bash", _SCRIPT, "up", folder, *(["accounting"] if accounting else [])], check=True)
        yield folder
    finally:
        subprocess.run(["bash", _SCRIPT, "down", folder], check=False)
        shutil.rmtree(folder, ignore_errors=True)
        if previous is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = previous


def first_job_id(folder: Path) -> int:
    """Return the number that the cluster in a folder gives to its first job."""
    (line,) = (line for line in (folder / "slurm.conf").read_text().splitlines() if line.startswith("FirstJobId="))
    return int(line.partition("=")[2])


def wait_for_job(job_id: str, seconds: float = 150.0) -> JobState:
    """Wait until a job is over; return its last state."""
    wait_until(lambda: job_state(job_id).is_over, seconds, f"job {job_id} is over, not {job_state(job_id)}")
    return job_state(job_id)
