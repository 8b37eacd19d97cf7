"""Section of the report on extracted squads."""

from pathlib import Path

from trainer import report_page as html
from trainer.extraction import read_summary
from trainer.squad_summary import SquadSummary


def squads_section(run_dir: Path) -> html.Section:
    """Tabulate the extracted squads."""
    title = "Extracted squads"
    folders = sorted((run_dir / "squads").glob("*/"))
    squads = [squad for folder in folders if (squad := read_summary(folder)) is not None]
    if not squads:
        body = html.missing("no squad in squads/", f"`modsquad extract {run_dir} --task TASK` makes one.")
        return html.Section(title=title, body=body)
    headers = ["task", "experts kept", "parameters", "MACs per image", "metric", "before", "after", "change"]
    headers += ["unaffected tokens", "step"]
    caption = (
        "A squad is one task as a standalone model, measured beside the whole one on the same images; one bar per "
        "expert layer. Unaffected tokens are those whose chosen experts all stay, in every layer. MACs stay as they "
        "are: every token still uses as many experts."
    )
    body = html.table(headers, [_squad_row(squad) for squad in squads], right=headers[5:])
    return html.Section(title=title, caption=caption, body=body)


def _squad_row(squad: SquadSummary) -> list[html.Cell]:
    return [
        squad.task,
        html.bars([(layer.name, len(layer.kept), layer.num_experts) for layer in squad.layers]),
        f"{html.quantity(squad.parameters_before)} → {html.quantity(squad.parameters_after)}",
        f"{html.quantity(squad.macs_before)} → {html.quantity(squad.macs_after)}",
        squad.metric,
        squad.value_before,
        squad.value_after,
        html.percent(squad.relative_change, signed=True),
        html.percent(squad.unaffected_tokens),
        squad.step,
    ]
