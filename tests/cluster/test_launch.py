"""Jobs on a real SLURM: two nodes, warnings and lost ranks, failures, sweeps."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from cluster.env import SLURM_PORTS, RankEnv, free_port
from cluster.jobs import cancel_job, job_state
from cluster.launch import Run, read_job, run_locally, sbatch_script, submit
from configs.errors import UserError
from configs.launch import LaunchConfig
from configs.load import dump_config, load_config
from tests.cluster.warned_element import ENTRY, FIRST, LAST, SECOND, starts
from tests.services.slurm import first_job_id, running_slurm, wait_for_job
from tests.services.waiting import wait_until
from tests.trainer.loop_run import loop_config, make_shards
from trainer.run_files import StepRecord, read_steps

MODSQUAD = (sys.executable, "-m", "trainer.cli")
STEPS = 40
TWO_NODES = LaunchConfig(nodes=2, cpus_per_rank=1, time="10", max_requeues=2)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    with running_slurm() as folder:
        yield folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(slurm: Path, shards: Path) -> list[StepRecord]:
    """The lines of a run on two nodes that nothing happened to.

    It is the first job of its cluster, submitted by a rank of another run, and its first choice of a port is taken. The
    folder that it was submitted from holds other code of the same name by then.
    """
    run = make_run(shards, "undisturbed")
    first = first_job_id(slurm)
    (shards / "cluster").mkdir()
    (shards / "cluster" / "__init__.py").write_text("raise RuntimeError('not the code that was submitted')")
    with (
        contextlib.chdir(shards),
        socket.create_server(("127.0.0.1", SLURM_PORTS.start + first), reuse_port=True),
        mock.patch.dict(os.environ, RankEnv(master_port=free_port()).variables()),
    ):
        (record,) = submit([run], TWO_NODES, run.run_dir / "slurm")
        assert wait_for_job(record.job_id).state == "COMPLETED", log(run)
    assert record.job_id == str(first)
    return read_steps(run.run_dir)


def make_run(shards: Path, name: str, *overrides: str) -> Run:
    run_dir = shards / name
    steps = (f"train.steps={STEPS}", "checkpoint.every_steps=10", f"run_dir={run_dir}")
    return Run(run_dir, dump_config(loop_config(shards, *steps, *overrides)))


def log(run: Run) -> str:
    return "\n".join(path.read_text() for path in sorted((run.run_dir / "slurm").glob("*_log.*")))


def wait_for_step(run: Run, step: int) -> None:
    def reached() -> bool:
        steps = read_steps(run.run_dir)
        return bool(steps) and steps[-1].step >= step

    wait_until(reached, 120, f"step {step}\n{log(run)}")


def assert_same_training(steps: list[StepRecord], expected: list[StepRecord]) -> None:
    assert [line.step for line in steps] == [line.step for line in expected]
    assert [line.loss for line in steps] == [line.loss for line in expected]


def test_a_job_on_two_nodes_trains_to_the_end(undisturbed: list[StepRecord], shards: Path) -> None:
    assert [line.step for line in undisturbed] == list(range(1, STEPS + 1))
    logs = sorted(path.name.partition("_")[2] for path in (shards / "undisturbed" / "slurm").glob("*_log.out"))
    assert logs == ["0_log.out", "1_log.out"]
    assert (shards / "undisturbed" / "evaluation" / f"step_{STEPS:08d}_val.json").is_file()


def test_a_warned_job_saves_goes_back_into_the_queue_and_goes_on(undisturbed: list[StepRecord], shards: Path) -> None:
    run = make_run(shards, "warned")
    (record,) = submit([run], TWO_NODES, run.run_dir / "slurm")
    wait_for_step(run, 3)
    subprocess.run(["scancel", "--signal=USR2", record.job_id], check=True)
    assert wait_for_job(record.job_id).state == "COMPLETED", log(run)
    assert "interrupted by SIGUSR2" in log(run)
    assert "back into the queue, restart 1" in log(run)
    assert_same_training(read_steps(run.run_dir), undisturbed)


def test_a_job_that_lost_a_rank_goes_back_into_the_queue(undisturbed: list[StepRecord], shards: Path) -> None:
    run = make_run(shards, "lost")
    (record,) = submit([run], TWO_NODES, run.run_dir / "slurm")
    wait_for_step(run, 12)
    os.kill(rank_process(record.job_id, 1), signal.SIGKILL)
    assert wait_for_job(record.job_id).state == "COMPLETED", log(run)
    assert "back into the queue, restart 1" in log(run)
    assert_same_training(read_steps(run.run_dir), undisturbed)


def test_restarts_are_counted(slurm: Path, shards: Path) -> None:
    run = make_run(shards, "stubborn")
    launch = TWO_NODES.model_copy(update={"max_requeues": 0})
    (record,) = submit([run], launch, run.run_dir / "slurm")
    wait_for_step(run, 3)
    subprocess.run(["scancel", "--signal=USR2", record.job_id], check=True)
    assert wait_for_job(record.job_id).state == "FAILED"
    assert "after 0 restarts: not put back into the queue (max_requeues)" in log(run)


def test_a_job_that_fails_says_why_and_is_not_tried_again(slurm: Path, shards: Path) -> None:
    run = make_run(shards, "failing", f"data.train={shards}/nothing")
    (record,) = submit([run], TWO_NODES, run.run_dir / "slurm")
    assert wait_for_job(record.job_id).state == "FAILED"
    shown = modsquad("logs", str(run.run_dir))
    assert f"error: there is no folder {shards}/nothing" in shown.stdout
    assert "restart" not in log(run)


def test_a_sweep_is_an_array_of_runs(slurm: Path, shards: Path) -> None:
    config = shards / "sweep.yaml"
    config.write_text(make_run(shards, "sweep", "train.steps=2").config)
    options = ("--sweep", "optim.lr=0.001,0.0001", "--cpus-per-rank", "1", "--time", "10")
    launched = modsquad("launch", str(config), *options)
    assert "submitted 2 runs as the array" in launched.stdout, launched.stderr
    folders = sorted((shards / "sweep").glob("00*"))
    assert [folder.name for folder in folders] == ["000_optim.lr=0.001", "001_optim.lr=0.0001"]
    for folder in folders:
        assert wait_for_job(read_job(folder).job_id).state == "COMPLETED"
        assert read_steps(folder)[0].learning_rate == float(folder.name.partition("=")[2]) / 2
    shown = modsquad("status", *map(str, folders)).stdout
    assert shown.count("completed") == 2
    assert shown.count("2/2") == 2


def test_a_sweep_over_paths_of_the_same_name_trains_from_each(slurm: Path, shards: Path) -> None:
    config, paths = shards / "paths.yaml", {"/one/model.safetensors", "/two/model.safetensors"}
    config.write_text(make_run(shards, "paths").config)
    launched = modsquad("launch", str(config), "--sweep", f"train.init_from={','.join(paths)}", "--slurm", "hold")
    assert launched.returncode == 0, launched.stderr
    root = shards / "paths"
    configs = [load_config(path) for path in (root / "slurm").glob("config-*.yaml")]
    assert {run.train.init_from for run in configs} == paths
    folders = sorted(root.glob("[0-9]*"))
    assert sorted(run.run_dir for run in configs) == list(map(str, folders))
    for folder in folders:
        cancel_job(read_job(folder).job_id)


@pytest.mark.parametrize(("sweep", "name"), [((), "run"), (("--sweep", "optim.lr=0.1"), "run/000_optim.lr=0.1")])
def test_a_job_trains_in_its_folder_whatever_that_is_called(
    slurm: Path, shards: Path, tmp_path: Path, sweep: tuple[str, ...], name: str
) -> None:
    folder = tmp_path / "it's #1"
    folder.mkdir()
    (tmp_path / "recipe.yaml").write_text(make_run(shards, "unused", "run_dir=run").config)
    with contextlib.chdir(folder):
        launched = modsquad("launch", "../recipe.yaml", "--slurm", "hold", *sweep)
    assert launched.returncode == 0, launched.stderr
    cancel_job(read_job(folder / name).job_id)
    (config,) = (folder / "run" / "slurm").glob("config-*.yaml")
    assert load_config(config).run_dir == str(folder / name)
    assert shlex.quote(str(folder / name)) in launched.stdout


def test_of_a_sweep_only_the_element_that_was_warned_starts_again(slurm: Path, tmp_path: Path) -> None:
    runs = [Run(tmp_path / f"run_{element}", str(tmp_path), ENTRY) for element in (FIRST, SECOND, LAST)]
    launch = LaunchConfig(cpus_per_rank=1, time="10")
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2])):  # sbatch hands it on
        records = submit(runs, launch, tmp_path / "slurm")
    for record in records:
        assert wait_for_job(record.job_id).state == "COMPLETED", starts(tmp_path)
    assert sorted(starts(tmp_path)) == [FIRST, SECOND, LAST, LAST]


def test_a_cancelled_job_is_over(slurm: Path, shards: Path) -> None:
    run = make_run(shards, "cancelled", "train.steps=100000")
    (record,) = submit([run], TWO_NODES, run.run_dir / "slurm")
    wait_until(lambda: job_state(record.job_id).state == "RUNNING", 60, "running")
    cancel_job(record.job_id)
    assert wait_for_job(record.job_id).state == "CANCELLED"


def test_sbatch_accepts_the_script_of_a_dry_run(slurm: Path, shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(make_run(shards, "dry").config)
    options = (
        "--nodes",
        "2",
        "--cpus",
        "2",
        "--cpus-per-rank",
        "2",
        "--time",
        "1:00:00",
        "--partition",
        "normal",
        "--slurm",
        "nice=5",
    )
    script = modsquad("launch", str(config), *options, "--dry-run").stdout
    (tmp_path / "script.sh").write_text(script)
    tried = subprocess.run(
        ["sbatch", "--test-only", tmp_path / "script.sh"], capture_output=True, text=True, check=False
    )
    assert "using 8 processors on nodes node[1-2] in partition normal" in tried.stderr
    assert not (shards / "dry").exists(), "a dry run writes nothing"


def test_what_sbatch_refuses_is_told_in_its_words(slurm: Path, shards: Path) -> None:
    run = make_run(shards, "refused")
    launch = TWO_NODES.model_copy(update={"partition": "nowhere"})
    with pytest.raises(UserError, match=r"sbatch refused the job: .*[Ii]nvalid partition"):
        submit([run], launch, run.run_dir / "slurm")


def test_an_unknown_job_is_unknown(slurm: Path) -> None:
    assert job_state("999999").state == "UNKNOWN"


def test_options_of_sbatch_are_in_the_script(tmp_path: Path) -> None:
    launch = LaunchConfig(
        nodes=3,
        gpus_per_node=8,
        account="vision",
        constraint="h100",
        grace_seconds=300,
        slurm={"exclusive": True, "comment": "two words"},
        setup=("module load cuda",),
        container_image="modsquad.sqsh",
        container_mounts=("/data:/data:ro",),
        python="/opt/venv/bin/python",
    )
    script = sbatch_script([Run(tmp_path / "run", "")], launch, tmp_path / "run" / "slurm")
    lines = script.splitlines()
    for option in (
        "nodes=3",
        "gpus-per-node=8",
        "ntasks-per-node=8",
        "account=vision",
        "constraint=h100",
        "signal=USR2@300",
        "exclusive",
        "comment='two words'",
        "job-name=modsquad-run",
        "requeue",
    ):
        assert f"#SBATCH --{option}" in lines
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if line.startswith("srun "))
    mounts = f"--container-mounts=/data:/data:ro,{tmp_path}/run:{tmp_path}/run"
    assert f"--container-image=modsquad.sqsh {mounts} /opt/venv/bin/python" in script


def test_the_same_job_runs_without_slurm(shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(make_run(shards, "local", "train.steps=3", "checkpoint.every_steps=3").config)
    done = modsquad("launch", str(config), "--local", "--cpus", "2")
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stdout
    assert [line.step for line in read_steps(shards / "local")] == [1, 2, 3]
    failed = modsquad("launch", str(config), "--local", "optim.lr=1e-5")
    assert failed.returncode == 2
    assert "holds a run with another optim.lr" in failed.stderr


@pytest.mark.parametrize(
    ("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_local_job_that_is_stopped_saves(
    number: signal.Signals, send: Callable[[int, int], None], shards: Path, tmp_path: Path
) -> None:
    run = make_run(shards, f"stopped_by_{number.name}", "train.steps=100000", "checkpoint.every_steps=100000")
    config = tmp_path / "run.yaml"
    config.write_text(run.config)
    launcher = subprocess.Popen([*MODSQUAD, "launch", config, "--local"], env=variables(), start_new_session=True)
    try:
        wait_for_step(run, 3)
        send(launcher.pid, number)  # Ctrl-C in a terminal reaches the ranks, too
        assert launcher.wait(120) == 128 + number
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    last = read_steps(run.run_dir)[-1].step
    assert [path.name for path in (run.run_dir / "checkpoints").glob("step_*")] == [f"step_{last:08d}"]


def test_local_ranks_run_the_code_as_it_is_now_behind_the_lines_of_setup(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "slurm"
    setup = (f"echo once >>'{tmp_path}/count'", "export SET_UP='in two\nlines'")
    show = [sys.executable, "-c", "import cluster, os; print(cluster.__file__, os.environ['SET_UP'])"]
    launch = LaunchConfig(ranks_per_node=2, setup=setup)
    assert run_locally(show, [Run(tmp_path / "run", "")], launch, folder) == 0
    (code,) = folder.glob("code-*")
    assert (folder / "rank_1.log").read_text() == f"{code}/cluster/__init__.py in two\nlines\n"
    assert (tmp_path / "count").read_text() == "once\n"
    with pytest.raises(UserError, match="setup ended their shell with status 3"):
        run_locally(show, [Run(tmp_path / "run", "")], LaunchConfig(setup=("exit 3",)), folder)


def test_a_local_sweep_goes_on_behind_a_run_that_fails_and_ends_with_a_signal(tmp_path: Path) -> None:
    """Each configuration is a program."""
    fails, stops = "raise SystemExit(2)", "import os, time; os.kill(os.getppid(), 15); time.sleep(60)"
    runs = [Run(tmp_path / str(number), program) for number, program in enumerate((fails, "", stops, ""))]
    launch, folder = LaunchConfig(), tmp_path / "slurm"
    assert run_locally([sys.executable], runs[:2], launch, folder) == 2
    assert run_locally([sys.executable], runs, launch, folder) == 128 + signal.SIGTERM
    assert [run.run_dir.exists() for run in runs] == [True, True, True, False]


def modsquad(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MODSQUAD, *arguments], capture_output=True, text=True, check=False, env=variables())


def variables() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def rank_process(job_id: str, rank: int) -> int:
    """Return the process of a rank: the one that runs Python with that place in the job."""
    wanted = (f"SLURM_JOB_ID={job_id}".encode(), f"SLURM_PROCID={rank}".encode())
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if all(variable in variables for variable in wanted) and b"submitit.core._submit" in command:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")
