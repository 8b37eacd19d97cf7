"""`modsquad quickstart`: the whole road on one machine, small.

Every stage finds what an earlier, interrupted start has finished, and goes on from there.
"""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cluster.cpu import usable_cores
from cluster.local import run_ranks
from configs.errors import UserError
from configs.load import differing_keys, load_config, make_override
from data_pipeline.rooms.source import RoomsSource
from trainer.checkpoint.files import checkpoint_step
from trainer.checkpoint.reading import CHECKPOINTS, complete_folders
from trainer.cli.data import pack_with_progress
from trainer.evaluation.evaluate import latest_evaluation
from trainer.report.build import write_report
from trainer.report.tables import evaluation_table, squad_table
from trainer.squads.extraction import extract_tasks, read_summary
from trainer.terminal import say

RANKS = 2
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # the same everywhere, also where there is one GPU for two ranks
ROOMS_PER_SHARD = 64
HELD_OUT_OFFSET = 10_000_000  # held-out rooms have numbers that no training set reaches
SQUADS = ("depth_zbuffer", "normal")


def run_quickstart(out: Path, *, rooms: int, held_out: int, overrides: Sequence[str] = ()) -> int:
    """Make rooms, train, evaluate, extract two squads, write the report.

    Args:
        out: folder of the run; the rooms go to `out/data`.
        rooms, held_out: rooms to train on and to evaluate on.
        overrides: dotted overrides of the recipe `quickstart`.

    Returns:
        The exit status: 0, or the training processes' own.

    Raises:
        UserError: a mistake in the overrides, no space, an unusable folder, or one whose run has done more steps.
    """
    console = Console()
    train, val = out / "data" / "train", out / "data" / "val"
    own = {"run_dir": out, "data.train": train, "data.val": val}
    arguments = [*(make_override(key, path) for key, path in own.items()), *overrides]
    config = load_config("quickstart", arguments)
    if moved := own.keys() & set(differing_keys(load_config("quickstart", arguments[: len(own)]), config)):
        raise UserError(
            f"the overrides set {min(moved)}: the quickstart puts everything into one folder; choose it with --out"
        )
    steps, size = config.train.steps, config.data.image_size
    if (done := _steps_done(out)) > steps:
        raise UserError(
            f"{out} holds a run of {done} steps, more than train.steps {steps}: give at least as many, or another --out"
        )

    console.rule("1/4 rooms")
    for folder, count, offset in ((train, rooms, 0), (val, held_out, HELD_OUT_OFFSET)):
        source = RoomsSource(images=count, size=size, seed=config.seed, offset=offset)
        pack_with_progress(source, folder, workers=usable_cores(), samples_per_shard=ROOMS_PER_SHARD)

    console.rule("2/4 training and evaluation")
    evaluation = latest_evaluation(out, step=steps)
    if evaluation is None:
        command = [sys.executable, "-m", "trainer.cli", "train", "quickstart", *arguments]
        if status := run_ranks(command, RANKS, out / "logs", ON_CPU):
            return status
        evaluation = latest_evaluation(out, step=steps)
        assert evaluation is not None, "training ends with an evaluation"
    console.print(evaluation_table(evaluation))

    console.rule("3/4 squads")
    tasks = [task for task in SQUADS if task in evaluation.tasks] or list(evaluation.tasks)[:2]
    squads = {task: out / "squads" / task for task in tasks}
    console.print(
        squad_table([read_summary(to, step=steps) or extract_tasks(out, [task], to) for task, to in squads.items()])
    )

    console.rule("4/4 report")
    page = write_report(out)
    say(_next_steps(out, page, val, squads[tasks[0]]), console=console)
    return 0


def _steps_done(out: Path) -> int:
    """Return the step that another start goes on from."""
    return max((checkpoint_step(folder.name) for folder in complete_folders(out / CHECKPOINTS)), default=0)


def _next_steps(out: Path, page: Path, val: Path, squad: Path) -> str:
    found = {
        f"{page}": "pictures of every task, the task x expert map, loss curves",
        f"{out / 'metrics.jsonl'}": "losses and mutual information, step by step",
        f"{out / 'evaluation'}": "every metric of every task",
        f"{squad.parent}": "one standalone model per folder",
        f"{out / 'checkpoints'}": "what a second start goes on from",
    }
    commands = {
        shlex.join(["modsquad", "data", "show", str(val), "rooms.png"]): "look at the rooms and their labels",
        shlex.join(
            ["modsquad", "predict", str(squad), "PHOTO.jpg", "--out", "predictions"]
        ): "run a squad on a photo of yours",
        shlex.join(["modsquad", "extract", str(out), "--task", "reshading"]): "take out another task's squad",
        "modsquad train quickstart --print": "see every setting; change any with key.sub=value",
    }
    if shutil.which("modsquad") is None:
        activate = shlex.join([".", str(Path(sys.prefix) / "bin" / "activate")])
        commands = {activate: "once, for the commands below", **commands}
    return f"All of it is in {out}:\n{_aligned(found)}\n\nTry next:\n{_aligned(commands)}"


def _aligned(lines: Mapping[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"  {what:{width}}   {why}" for what, why in lines.items())
