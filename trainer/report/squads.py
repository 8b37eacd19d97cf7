"""Section of the report on extracted squads."""

from pathlib import Path

from configs.errors import UserError
from trainer.report import page as html
from trainer.squads.export import CURVE_PICTURE
from trainer.squads.extraction import read_summary
from trainer.squads.summary import SquadSummary


def squads_section(run_dir: Path) -> html.Section:
    """Tabulate the extracted squads, a row per task, and show the trade-off of those extracted with `--curve`."""
    title = "Extracted squads"
    squads, unreadable = {}, ""
    for folder in sorted((run_dir / "squads").glob("*/")):
        try:
            summary = read_summary(folder)
        except UserError as error:
            unreadable += html.missing(f"the squad in {folder.name} ({error})", "The others are shown.")
        else:
            if summary is not None:
                squads[folder] = summary
    if not squads:
        body = html.missing("no squad in squads/", f"`modsquad extract {run_dir} --task TASK` makes one.")
        return html.Section(title=title, body=unreadable + body)
    headers = ["task", "experts kept", "parameters", "MACs per image", "metric", "before", "after", "change"]
    headers += ["unaffected tokens", "unaffected images", "step"]
    caption = (
        "A squad is one task, or several, as a standalone model, measured beside the whole one on the same images; one "
        "bar per expert layer. Unaffected tokens are those whose chosen experts all stay, in every layer; unaffected "
        "images those whose tokens all do. MACs are those of the squad's tasks. They stay as they are: every token "
        "still uses as many experts."
    )
    rows = [row for summary in squads.values() for row in _squad_rows(summary)]
    body = html.table(headers, rows, right=headers[5:]) + unreadable
    for folder, summary in squads.items():
        if (folder / CURVE_PICTURE).is_file():
            names = ", ".join(summary.tasks)
            body += html.chart(folder / CURVE_PICTURE, f"Squads of {names}: what other thresholds would have given")
    return html.Section(title=title, caption=caption, body=body)


def _squad_rows(squad: SquadSummary) -> list[list[html.Cell]]:
    """Return a row per task; the sizes, which the tasks share, stand in the first."""
    sizes: list[html.Cell] = [
        html.bars([(layer.name, len(layer.kept), layer.num_experts) for layer in squad.layers]),
        f"{html.quantity(squad.parameters_before)} → {html.quantity(squad.parameters_after)}",
        f"{html.quantity(squad.macs_before)} → {html.quantity(squad.macs_after)}",
    ]
    return [
        [
            score.task,
            *(sizes if number == 0 else [""] * len(sizes)),
            score.metric,
            score.before,
            score.after,
            html.percent(score.relative_change, signed=True),
            html.percent(score.unaffected_tokens),
            html.percent(score.unaffected_images),
            squad.step,
        ]
        for number, score in enumerate(squad.scores)
    ]
