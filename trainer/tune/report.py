"""What a search of `modsquad tune` found: a table, a picture (speed against memory) and `tuned.yaml`."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import yaml
from rich import box
from rich.table import Table

from cluster.tune_space import Value
from configs.atomic import atomic_path, write_text_atomically
from trainer.charts.figure import BLUE, GREEN, INK, ORANGE, figure
from trainer.footprint.plan import GIB
from trainer.tune.files import SearchRecord, TrialRecord
from trainer.tune.search import Tuning

TUNED_FILE, PICTURE_FILE = "tuned.yaml", "tuning.png"


def tuning_table(tuning: Tuning) -> Table:
    """Return one row per trial, fastest first: the best in bold, "configured" the run as configured.

    Keys are named by their last part.
    """
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False, show_edge=False)
    keys = [key for key, values in tuning.space.values.items() if len(values) > 1]
    names = [key.rpartition(".")[2].replace("_", "\n") for key in keys]
    for name in ("#", *names, "images/s", "GiB\nper rank", "data\nwait"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    order = {"done": 0, "stopped": 1, "started": 2, "failed": 3}
    for trial in sorted(tuning.trials, key=lambda trial: (order[trial.status], -(trial.images_per_second or 0))):
        notes: list[str] = [trial.status] if trial.status != "done" else []
        notes += ["configured"] if trial is tuning.as_configured else []
        table.add_row(
            str(trial.trial),
            *(_short(trial.values[key]) for key in keys),
            *_figures(trial),
            ", ".join(notes),
            style="bold" if trial is tuning.best else None,
        )
    return table


def describe_trial(trial: TrialRecord) -> str:
    """Return one line about a trial that is over."""
    values = " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in trial.values.items())
    if trial.status == "failed":
        return f"trial {trial.trial}: failed ({trial.reason}): {values}"
    speed, memory, _ = _figures(trial)
    stopped = ", stopped as clearly slower than the best" if trial.status == "stopped" else ""
    return f"trial {trial.trial}: {speed} images/s, {memory} GiB per rank{stopped}: {values}"


def pareto_front(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials that no other beats in speed without taking more memory, from little memory to much."""
    front: list[TrialRecord] = []
    for trial in sorted(trials, key=lambda trial: (trial.most_bytes, -(trial.images_per_second or 0))):
        if not front or (trial.images_per_second or 0) > (front[-1].images_per_second or 0):
            front.append(trial)
    return front


def write_tuning(tuning: Tuning, search: SearchRecord, out: Path) -> Path | None:
    """Write the picture and `tuned.yaml`; return the path of the latter, or None when no trial came to its end.

    Raises:
        UserError: `out` cannot be written.
    """
    with atomic_path(out / PICTURE_FILE) as path:
        _draw(tuning, path)
    if (best := tuning.best) is None:
        return None
    write_text_atomically(out / TUNED_FILE, _tuned(tuning, search, best))
    return out / TUNED_FILE


def _tuned(tuning: Tuning, search: SearchRecord, best: TrialRecord) -> str:
    before = tuning.as_configured
    speed = None if before is None else before.images_per_second
    compared = f" (as configured: {speed:.4g})" if speed else " (as configured: not measured)"
    over = sum(trial.status != "started" for trial in tuning.trials)
    comment = [
        f"{best.images_per_second:.4g} images/s{compared}, {best.most_bytes / GIB:.3g} GiB on the fullest rank.",
        f"Median of {search.steps - search.warmup_steps} steps on {search.ranks} "
        f"{'rank' if search.ranks == 1 else 'ranks'}, each on {best.device};",
        f"the best of {over} trials among {len(tuning.space.points)} settings, {datetime.now():%Y-%m-%d}.",
        f"For {search.ranks} {'rank' if search.ranks == 1 else 'ranks'} and train.images_per_step "
        f"{search.config.train.images_per_step}: modsquad train CONFIG {TUNED_FILE}",
    ]
    sections: dict[str, dict[str, Value]] = {}
    for key, value in best.values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return "".join(f"# {line}\n" for line in comment) + yaml.safe_dump(sections, sort_keys=False)


def _draw(tuning: Tuning, path: Path) -> None:
    done = [trial for trial in tuning.trials if trial.status == "done"]
    stopped = [trial for trial in tuning.trials if trial.status == "stopped"]
    failed = sum(trial.status == "failed" for trial in tuning.trials)
    with figure(path, rows=1, columns=1, row_height=4.5) as (_, (axis,)):
        for trials, colour, label in ((stopped, INK, "stopped early"), (done, BLUE, "measured")):
            if trials:
                axis.scatter(*_places(trials), s=26, color=colour, label=label)
        if front := pareto_front([*done, *stopped]):
            axis.plot(*_places(front), color=GREEN, drawstyle="steps-post", label="Pareto front", zorder=0)
        named = {trial.trial: "as configured" for trial in (tuning.as_configured,) if trial is not None}
        if tuning.best is not None:
            named[tuning.best.trial] = f"best, {named[tuning.best.trial]}" if tuning.best.trial in named else "best"
        for trial in (trial for trial in (*done, *stopped) if trial.trial in named):
            (memory,), (speed,) = _places([trial])
            axis.scatter([memory], [speed], s=90, facecolors="none", edgecolors=ORANGE)
            axis.annotate(named[trial.trial], (memory, speed), xytext=(-7, 5), textcoords="offset points", ha="right")
        axis.margins(x=0.15)
        axis.set(xlabel="peak memory of the fullest rank, GiB", ylabel="images per second")
        axis.set_title(f"{len(tuning.trials)} trials" + (f", {failed} failed" if failed else ""))
        if done or stopped:
            axis.legend(loc="lower right")


def _places(trials: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
    return [trial.most_bytes / GIB for trial in trials], [trial.images_per_second or 0.0 for trial in trials]


def _figures(trial: TrialRecord) -> tuple[str, str, str]:
    """Speed, memory, share of a step spent waiting for data."""
    if trial.images_per_second is None or not trial.step_seconds:
        return "-", "-", "-"
    wait = (trial.data_wait_seconds or 0.0) / trial.step_seconds
    return f"{trial.images_per_second:.4g}", f"{trial.most_bytes / GIB:.2f}", f"{wait:.0%}"


def _short(value: Value) -> str:
    """Return a value as it is read in a table: 50M, yes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 1_000_000:
        return f"{value / 1e6:g}M"
    return str(value)
