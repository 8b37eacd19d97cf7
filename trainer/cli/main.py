"""The `modsquad` command.

Exit status: 0 done; 2 a mistake that the user can mend, told in one line; 130, 140 and 143 interrupted after a safe
save; 75 another rank was lost, try again; 1 a fault of ours, with its traceback (`--debug` shows that of every error).
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from cluster.cpu import tune_process
from configs.errors import UserError
from trainer.cli.bench import bench
from trainer.cli.cluster import cancel, launch, logs, status, watch
from trainer.cli.compare import compare
from trainer.cli.data import app as data_app
from trainer.cli.doctor import doctor
from trainer.cli.plan import plan
from trainer.cli.tune import tune, tune_trial
from trainer.terminal import say

app = typer.Typer(
    name="modsquad",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train modular multi-task vision transformers: squads of experts, one router per task.",
)
app.add_typer(data_app, name="data")
app.command()(bench)
for command in (compare, launch, plan, tune, status, logs, watch, cancel, doctor):
    app.command()(command)
app.command(hidden=True)(tune_trial)

Run = Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]
Config = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides: key.sub=value; or YAML files of keys.", show_default=False)
]


def main() -> None:
    """Entry point of the console script."""
    tune_process()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a lost rank one line of ours tells
    try:
        app()
    except UserError as error:
        if _debugging():
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _debugging() -> bool:
    return "--debug" in sys.argv


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("modsquad"))
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    del show_version  # its callback has done it
    del debug  # `_debugging` reads it, also for errors that pass through here
    del local_rank  # the deepspeed launcher insists on it, and says the same in the environment


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder that receives everything.")] = Path("runs/quickstart"),
    rooms: Annotated[int, typer.Option(min=16, help="Rooms to train on.")] = 1000,
    held_out: Annotated[int, typer.Option(min=8, help="Rooms to evaluate on.")] = 128,
    overrides: Overrides = None,
) -> None:
    """Rooms, shards, training on two processes, evaluation, two squads and a report, in about five minutes on a CPU."""
    from trainer.quickstart import run_quickstart

    try:
        sys.exit(run_quickstart(out, rooms=rooms, held_out=held_out, overrides=overrides or []))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        sys.exit(130)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print", help="Show the resolved configuration, what the model costs, and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, take the worst step, report memory and time, and stop.")
    ] = False,
) -> None:
    """Train; resume when the run folder holds a checkpoint. Alone: one process; or under torchrun, deepspeed, srun."""
    from configs.load import dump_config
    from trainer.recipes import load_recipe

    if print_config:
        from trainer.footprint.cost_table import cost_comment

        resolved = load_recipe(config, overrides or [])
        print(f"{dump_config(resolved)}\n{cost_comment(resolved)}", end="")
        return
    from cluster.env import detect
    from cluster.local import die_with_launcher
    from trainer.entry import train_rank
    from trainer.footprint.dry_run import dry_run_rank

    die_with_launcher()
    start = dry_run_rank if dry_run else train_rank
    sys.exit(start(config, detect(), overrides=overrides or [], debug=_debugging()))


@app.command()
def evaluate(
    run: Run,
    split: Annotated[Literal["train", "val"], typer.Option(help="Which shards.")] = "val",
) -> None:
    """Evaluate the latest checkpoint on every task, against a constant predictor."""
    from trainer.evaluation.evaluate import evaluate_run
    from trainer.report.tables import evaluation_table

    Console().print(evaluation_table(evaluate_run(run, split)))


@app.command()
def conflict(
    run: Run,
    images: Annotated[int, typer.Option(min=1, help="Training images to take gradients of.")] = 64,
) -> None:
    """Measure where the tasks' gradients conflict: their cosines per layer, in experts and in shared weights."""
    from trainer.evaluation.gradient_conflict import measure_run
    from trainer.report.tables import conflict_table

    Console().print(conflict_table(measure_run(run, images)))


@app.command()
def extract(
    run: Run,
    task: Annotated[str, typer.Option(help="Task that leaves, or several, separated by commas.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder of the squad; default RUN/squads/TASK.")] = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Keep experts that at least this share of a task's tokens choose.")
    ] = 0.01,
    routing: Annotated[
        Literal["ledger", "validation"],
        typer.Option(help="Count choices in the evaluation of the checkpoint, or anew on the validation shards."),
    ] = "ledger",
    curve: Annotated[bool, typer.Option("--curve", help="Also measure the squads of other thresholds.")] = False,
) -> None:
    """Cut the squad of one task or several out of a trained model and measure it beside the whole."""
    from trainer.report.tables import curve_table, squad_table
    from trainer.squads.curve import read_curve
    from trainer.squads.extraction import extract_tasks

    tasks = sorted(set(task.split(",")))
    folder = out or run / "squads" / "+".join(tasks)
    summary = extract_tasks(run, tasks, folder, threshold=threshold, routing=routing, curve=curve)
    Console().print(squad_table([summary]))
    if measured := read_curve(folder):
        Console().print(curve_table(measured))
    say(f"wrote {folder}")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="Squad folder, exported model or run folder.", show_default=False)],
    images: Annotated[list[Path], typer.Argument(help="Photos of any size.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder that receives pictures and arrays.", show_default=False)],
    tasks: Annotated[str | None, typer.Option(help="Tasks separated by commas; default: all of the model.")] = None,
) -> None:
    """Predict tasks on photos."""
    from trainer.evaluation.predict import predict as run_prediction

    written = run_prediction(model, images, out, tasks=tasks.split(",") if tasks else None)
    say(f"wrote {len(written)} files to {out}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Run folder, or squad folder for .onnx and .pt2.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File to write; its suffix is the format.", show_default=False)],
) -> None:
    """Write a run's whole model as one .safetensors file, or a squad as .onnx or .pt2 (torch.export)."""
    from trainer.squads.export import export_model, load_squad
    from trainer.squads.portable import CHECKED, SUFFIXES, save_portable

    checked = ""
    if out.suffix == ".safetensors":
        export_model(model, out)
    elif out.suffix in SUFFIXES:
        difference = save_portable(load_squad(model), out)
        checked = f": within {difference:.1e} of the squad on {CHECKED} random images"
    else:
        raise UserError(f"cannot export to '{out}': choose .safetensors for a run, .onnx or .pt2 for a squad")
    say(f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB){checked}")


@app.command()
def report(run: Run) -> None:
    """Write RUN/report/index.html and its pictures."""
    from trainer.report.build import write_report

    say(f"wrote {write_report(run)}")


@app.command()
def monitor(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to write into; default RUN/monitoring.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where Prometheus will listen.")] = 9090,
    scrape_seconds: Annotated[int, typer.Option(min=1, help="Between two looks at the metrics.")] = 15,
) -> None:
    """Write a configuration of Prometheus, alerts and a Grafana dashboard for runs, and say how to start them."""
    from trainer.telemetry.monitor import write_monitoring

    folder = out or runs[0] / "monitoring"
    written = write_monitoring(runs, folder, port=port, scrape_seconds=scrape_seconds)
    say(f"wrote {folder}; start each in a terminal of its own:")
    for command in written.commands(port):
        say(f"  {command}")
