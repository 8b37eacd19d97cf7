"""A search on a real SLURM: its trials are an array, and a search that is killed waits for the jobs it has."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.launch import read_job
from configs.load import dump_config
from tests.services.slurm import running_slurm
from tests.services.waiting import wait_until
from tests.trainer.loop_run import loop_config, make_shards


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    with running_slurm() as folder:
        yield folder


def test_trials_are_an_array_and_jobs_of_a_killed_search_are_waited_for(slurm: Path, tmp_path: Path) -> None:
    make_shards(tmp_path)
    recipe, out = tmp_path / "tuned_run.yaml", tmp_path / "run" / "tuning"
    recipe.write_text(dump_config(loop_config(tmp_path, "train.micro_batch=1", "data.workers=0")))
    (tmp_path / "profile.yaml").write_text('nodes: 2\ncpus_per_rank: 1\ntime: "10"\n')
    command = [sys.executable, "-m", "trainer.cli", "tune", str(recipe), "--on", "slurm", "--steps", "3"]
    command += ["--profile", str(tmp_path / "profile.yaml"), "--budget", "2", "--at-once", "2"]
    for given in ("train.micro_batch=1,2", "parallel.zero_stage=1", "parallel.ep_size=1", "data.workers=0"):
        command += ["--search", given]
    command += ["--search", "parallel.bucket_elements=50000000", "--search", "train.activation_checkpointing=none"]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    folders = [out / "trials" / f"{number:03d}" for number in range(2)]

    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    def submitted() -> bool:
        assert first.poll() is None, "the search has ended"
        return all((folder / "slurm" / "job.json").is_file() for folder in folders)

    wait_until(submitted, 120, "an array")
    first.send_signal(signal.SIGKILL)
    first.wait()
    jobs = [read_job(folder).job_id for folder in folders]
    assert [job.partition("_")[2] for job in jobs] == ["0", "1"]
    assert len({job.partition("_")[0] for job in jobs}) == 1

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [read_job(folder).job_id for folder in folders] == jobs
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    over = [line for line in lines if line["status"] != "started"]
    assert [line["status"] for line in over] == ["done", "done"]
    assert all(len(line["peak_bytes"]) == 2 for line in over), "of every rank"
    assert sorted(line["values"]["train.micro_batch"] for line in over) == [1, 2]
    assert (out / "tuned.yaml").is_file()
