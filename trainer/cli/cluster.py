"""`modsquad launch`, `status`, `logs`, `watch`, `cancel`: runs as jobs of a SLURM cluster, and how they do."""

from __future__ import annotations

import itertools
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cluster.launch import JobRecord, Run

Option = typer.Option
RunFolder = Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]


def launch(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted overrides: key.sub=value.")] = None,
    profile: Annotated[str | None, Option(help="Cluster profile: YAML file, or cpu, gpu8, preemptible.")] = None,
    nodes: Annotated[int | None, Option(min=1, help="Machines.")] = None,
    gpus_per_node: Annotated[int | None, Option(min=0, help="GPUs of each, one rank per GPU.")] = None,
    cpus: Annotated[int | None, Option(min=1, help="Ranks of each node on CPUs, instead of GPUs.")] = None,
    cpus_per_rank: Annotated[int | None, Option(min=1, help="CPU cores of each rank.")] = None,
    mem_gb: Annotated[int | None, Option(min=1, help="Memory of each node in GiB.")] = None,
    time_limit: Annotated[str | None, Option("--time", help="Time limit, such as 24:00:00.")] = None,
    partition: Annotated[str | None, Option(help="Partition.")] = None,
    account: Annotated[str | None, Option(help="Account to charge.")] = None,
    qos: Annotated[str | None, Option(help="Quality of service.")] = None,
    constraint: Annotated[str | None, Option(help="Features that nodes must have.")] = None,
    exclude: Annotated[str | None, Option(help="Nodes not to use.")] = None,
    slurm: Annotated[
        list[str] | None, Option(help="Any option of sbatch: name=value, or name. May be repeated.")
    ] = None,
    setup: Annotated[list[str] | None, Option(help="Shell line to run before the ranks. May be repeated.")] = None,
    container_image: Annotated[str | None, Option(help="Image that pyxis starts every rank in.")] = None,
    max_requeues: Annotated[int | None, Option(min=0, help="At most so many restarts by itself.")] = None,
    sweep: Annotated[
        list[str] | None, Option(help="key=value1,value2: one run per value, as a job array. May be repeated.")
    ] = None,
    local: Annotated[
        bool, Option("--local", help="The same job on this machine, without SLURM; waits for it.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the batch script and stop.")] = False,
) -> None:
    """Train as a SLURM job that survives time limits, preemption and lost nodes; or as an array of them."""
    from cluster.launch import SLURM_FOLDER, run_locally, sbatch_script, submit
    from configs.launch import load_launch

    wanted = load_launch(
        profile,
        {
            "nodes": nodes,
            "gpus_per_node": 0 if cpus and gpus_per_node is None else gpus_per_node,
            "ranks_per_node": cpus,
            "cpus_per_rank": cpus_per_rank,
            "mem_gb": mem_gb,
            "time": time_limit,
            "partition": partition,
            "account": account,
            "qos": qos,
            "constraint": constraint,
            "exclude": exclude,
            "slurm": _slurm_options(slurm or []),
            "setup": setup,
            "container_image": container_image,
            "max_requeues": max_requeues,
        },
    )
    runs, root = _runs(config, overrides or [], sweep or [])
    folder = root / SLURM_FOLDER
    if dry_run:
        print(sbatch_script(runs, wanted, folder))
        return
    if local:
        sys.exit(run_locally([sys.executable, "-m", "trainer.cli", "train"], runs, wanted, folder))
    records = submit(runs, wanted, folder)
    _say_what_next(root, runs, records)


def status(runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)]) -> None:
    """Show what SLURM says of each run's job, and how far the run is."""
    from cluster.jobs import job_state
    from cluster.launch import read_job
    from trainer.telemetry.run_progress import describe_seconds, read_progress

    table = Table("run", "job", "state", "step", "images/s", "loss", "left", "checkpoint")
    for run in runs:
        record = read_job(run)
        state = job_state(record.job_id)
        reason = f" ({state.reason})" if state.reason else ""
        row: list[str | Text] = [Text(run.name), record.job_id, Text(f"{state.state.lower()}{reason}")]
        if not (run / "config.yaml").is_file():  # the job has not begun
            table.add_row(*row, *["-"] * 5)
            continue
        progress = read_progress(run)
        checkpoint = progress.checkpoint_step
        table.add_row(
            *row,
            f"{progress.step}/{progress.steps}",
            f"{progress.images_per_second:.1f}" if progress.images_per_second else "-",
            f"{progress.line.loss:.4f}" if progress.line else "-",
            "done" if progress.is_done else describe_seconds(progress.seconds_left),
            "-" if checkpoint is None else f"{checkpoint}, {describe_seconds(progress.checkpoint_age_seconds)} ago",
        )
    Console().print(table)


def logs(
    run: RunFolder,
    rank: Annotated[int | None, Option(min=0, help="Of this rank only; default: of all.", show_default=False)] = None,
    lines: Annotated[int, Option(min=0, help="Lines of each log to begin with.")] = 20,
    follow: Annotated[bool, Option("--follow", "-f", help="Go on until the job is over.")] = False,
) -> None:
    """Show the logs of a launched run, each line after its rank."""
    from cluster.jobs import job_state
    from cluster.launch import read_job
    from cluster.tail import LogTail

    record = read_job(run)
    ranks = range(record.ranks) if rank is None else [rank]
    tail = LogTail({(number, stream): record.log(number, stream) for number in ranks for stream in ("out", "err")})
    for (number, _), text in tail.last(lines):
        print(f"[{number}] {text}", flush=True)
    asked = time.monotonic()
    while follow:
        for (number, _), text in tail.new():
            print(f"[{number}] {text}", flush=True)
        if time.monotonic() - asked > 5.0:  # the controller serves everybody
            asked = time.monotonic()
            follow = not job_state(record.job_id).is_over
        time.sleep(0.5)


def watch(
    run: RunFolder,
    refresh: Annotated[float, Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, Option("--once", help="Show it once and stop.")] = False,
) -> None:
    """Show step, time left, losses and the load of every expert of a run that trains, until it is done."""
    from trainer.telemetry.watch import draw
    from trainer.telemetry.watch import watch as keep_watching

    if once:
        Console().print(draw(run))
    else:
        keep_watching(run, refresh_seconds=refresh, console=Console())


def cancel(runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)]) -> None:
    """End the jobs of runs now; `modsquad launch` goes on from their last checkpoints."""
    from cluster.jobs import cancel_job
    from cluster.launch import read_job

    for run in runs:
        record = read_job(run)
        cancel_job(record.job_id)
        print(f"cancelled job {record.job_id} of {run}")


def _slurm_options(given: list[str]) -> dict[str, Any]:
    pairs = [option.lstrip("-").partition("=") for option in given]
    return {name: value if separator else True for name, separator, value in pairs}


def _runs(config: str, overrides: list[str], sweep: list[str]) -> tuple[list[Run], Path]:
    """Return the runs and the folder that they have in common: the run's own, or that of the sweep."""
    from cluster.launch import Run
    from configs.errors import UserError
    from configs.load import dump_config, make_override
    from trainer.recipes import load_recipe

    base = load_recipe(config, overrides)
    root = Path(base.run_dir).resolve()
    if not sweep:
        moved = load_recipe(config, [*overrides, make_override("run_dir", root)])
        return [Run(root, dump_config(moved))], root
    axes = []
    for axis in sweep:
        key, separator, values = axis.partition("=")
        if not separator or not key or not values:
            raise UserError(f"--sweep '{axis}' is not of the form key=value1,value2")
        axes.append([f"{key}={value}" for value in values.split(",")])
    runs = []
    for number, chosen in enumerate(itertools.product(*axes)):
        run_dir = root / "_".join([f"{number:03d}", *chosen]).replace("/", "-")
        resolved = load_recipe(config, [*overrides, *chosen, make_override("run_dir", run_dir)])
        runs.append(Run(run_dir, dump_config(resolved)))
    return runs, root


def _say_what_next(root: Path, runs: list[Run], records: list[JobRecord]) -> None:
    first = records[0]
    job = first.job_id.partition("_")[0]
    what = f"{len(runs)} runs as the array {job}" if len(runs) > 1 else f"{root} as job {job}"
    console = Console()
    console.print(f"submitted {what}", soft_wrap=True, highlight=False, markup=False)
    folder = shlex.quote(str(runs[0].run_dir))
    folders = folder if len(runs) == 1 else f"{shlex.quote(str(root))}/[0-9]*"
    for purpose, command in (
        ("state", f"modsquad status {folders}"),
        ("logs", f"modsquad logs {folder} --follow"),
        ("the same", f"tail -F {shlex.quote(str(first.log(0)))}"),
        ("metrics", f"modsquad monitor {folder}"),
        ("end", f"scancel {job}"),
    ):
        console.print(f"  {purpose + ':':<10}{command}", soft_wrap=True, highlight=False, markup=False)
