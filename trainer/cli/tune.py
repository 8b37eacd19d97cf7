"""`modsquad tune`: the fastest layout and DeepSpeed settings of a run, by short real trials."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
import yaml
from rich.console import Console

from trainer.terminal import say

if TYPE_CHECKING:
    from cluster.tune_space import Space, Value
    from configs.launch import LaunchConfig
    from trainer.tune.files import SearchRecord
    from trainer.tune.search import Runner, Tuning

Option = typer.Option


def tune(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted overrides: key.sub=value, or YAML files.", show_default=False)
    ] = None,
    budget: Annotated[int, Option(min=1, help="Trials in all, those of an earlier call included.")] = 24,
    steps: Annotated[int, Option(min=3, help="Steps of a trial; the first quarter is warm-up.")] = 12,
    on: Annotated[Literal["local", "slurm"], Option(help="Processes of this machine, or SLURM arrays.")] = "local",
    ranks: Annotated[
        int | None, Option(min=1, help="Processes of this machine; default: one per GPU, or one.", show_default=False)
    ] = None,
    profile: Annotated[str | None, Option(help="Cluster profile of a trial's job, as for launch.")] = None,
    nodes: Annotated[int | None, Option(min=1, help="Machines of a trial's job.")] = None,
    time_limit: Annotated[str | None, Option("--time", help="Time limit of a trial's job.")] = None,
    at_once: Annotated[int, Option(min=1, help="Trials of one SLURM array.")] = 4,
    memory_gib: Annotated[
        float | None,
        Option(min=0.1, help="Memory of a GPU, or of a rank on CPUs; default: this machine's.", show_default=False),
    ] = None,
    search: Annotated[
        list[str] | None, Option(help="key=value1,value2: values to search instead of the usual. May be repeated.")
    ] = None,
    out: Annotated[Path | None, Option(help="Folder of the search; default: RUN/tuning.", show_default=False)] = None,
) -> None:
    """Find the fastest micro-batch, ep_size, ZeRO stage and the like at a fixed global batch, by short real runs."""
    from cluster.tune_space import search_space
    from configs.errors import UserError
    from model.cost import count_parameters
    from trainer.recipes import load_recipe
    from trainer.tune.files import SearchRecord
    from trainer.tune.place import slurm_job, this_machine
    from trainer.tune.report import tuning_table, write_tuning
    from trainer.tune.runs import LocalRunner, SlurmRunner
    from trainer.tune.search import fits_memory

    run = load_recipe(config, overrides or [])
    folder = (out or Path(run.run_dir) / "tuning").resolve()
    launch = _launch(on, ranks, profile, nodes, time_limit)
    place = slurm_job(launch, memory_gib) if launch else this_machine(ranks, memory_gib)
    space = search_space(
        run,
        place.ranks,
        gpus=place.gpus,
        cores_per_rank=place.cores_per_rank,
        parameters=count_parameters(run.model, run.task_specs, run.data.image_size).total,
        wanted=_wanted(search or []),
    )
    everything, limit = len(space.points), place.memory_bytes
    if limit is not None:
        space = space.kept(lambda values: fits_memory(run, place.ranks, limit, values))
    left_out = (
        f" ({everything - len(space.points)} more do not fit the memory)" if len(space.points) < everything else ""
    )
    say(f"{len(space.points)} settings{left_out}, {budget} trials, {place.ranks} ranks each: {folder}")
    asked = SearchRecord(
        config=run, ranks=place.ranks, steps=steps, warmup_steps=max(1, steps // 4), values=dict(space.values)
    )
    local = LocalRunner(ranks=place.ranks)
    runner = SlurmRunner(launch=launch, folder=folder / "slurm", at_once=at_once) if launch else local
    found = _search(asked, space, runner, folder, budget)
    Console().print(tuning_table(found))
    if (tuned := write_tuning(found, asked, folder)) is None:
        raise UserError(f"none of {len(found.trials)} trials came to its end; the last one: {found.trials[-1].reason}")
    say(f"wrote {tuned}; to use it: {shlex.join(['modsquad', 'train', config, *(overrides or []), str(tuned)])}")


def tune_trial(config: Annotated[str, typer.Argument(help="YAML file of a trial.", show_default=False)]) -> None:
    """Run one trial of `modsquad tune` on this rank."""
    from cluster.env import detect
    from cluster.local import die_with_launcher
    from trainer.tune.trial import trial_rank

    die_with_launcher()
    sys.exit(trial_rank(config, detect()))


def _search(asked: SearchRecord, space: Space, runner: Runner, folder: Path, budget: int) -> Tuning:
    from trainer.tune.report import describe_trial
    from trainer.tune.runs import SlurmRunner, Stopped
    from trainer.tune.search import tune as run_search

    try:
        return run_search(
            asked, space, runner, out=folder, budget=budget, tell=lambda trial: say(describe_trial(trial))
        )
    except (KeyboardInterrupt, Stopped) as stopped:
        jobs = ", and waits for the jobs that were submitted" if isinstance(runner, SlurmRunner) else ""
        print(f"interrupted; the same command goes on from there{jobs}", file=sys.stderr)
        sys.exit(stopped.exit_status if isinstance(stopped, Stopped) else 130)


def _launch(
    on: str, ranks: int | None, profile: str | None, nodes: int | None, time_limit: str | None
) -> LaunchConfig | None:
    """Return what to ask SLURM for, or None for this machine."""
    from configs.errors import UserError
    from configs.launch import load_launch

    if on == "slurm":
        if ranks is not None:
            raise UserError(
                "--ranks is for this machine: with --on slurm, --nodes and --profile say how many there are"
            )
        return load_launch(profile, {"nodes": nodes, "time": time_limit})
    if given := [name for name, value in (("profile", profile), ("nodes", nodes), ("time", time_limit)) if value]:
        raise UserError(f"--{given[0]} is for jobs: add --on slurm, or leave it out")
    return None


def _wanted(search: list[str]) -> dict[str, list[Value]]:
    from configs.errors import UserError

    wanted: dict[str, list[Value]] = {}
    for given in search:
        key, separator, values = given.partition("=")
        if not separator or not key or not all(values.split(",")):
            raise UserError(f"--search '{given}' is not of the form key=value1,value2")
        wanted[key] = list(dict.fromkeys(yaml.safe_load(value) for value in values.split(",")))
    return wanted
