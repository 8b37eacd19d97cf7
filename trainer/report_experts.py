"""Sections of the report on what the experts do."""

from pathlib import Path

from trainer import report_page as html
from trainer.charts import ExpertMap, expert_map_chart
from trainer.run_files import read_latest_ledger


def experts_section(folder: Path, run_dir: Path) -> html.Section:
    """Draw who uses whom, per expert layer that sees the task."""
    title = "Which task uses which experts"
    found = read_latest_ledger(run_dir)
    if found is None:
        body = html.missing("no routing ledger", f"`modsquad evaluate {run_dir}` makes one.")
        return html.Section(title=title, body=body)
    step, ledger = found
    maps = [
        ExpertMap(
            layer=layer.name,
            share_TE=(ledger.counts[layer.name] / ledger.tokens[layer.name][:, None]).double().numpy(),
            mutual_information=ledger.mutual_information(layer.name),
        )
        for layer in ledger.layers
        if layer.sees_task
    ]
    if not maps:
        body = html.missing("no expert layer sees the task", "All expert layers lie in the shared blocks.")
        return html.Section(title=title, body=body)
    expert_map_chart(folder / "experts.png", ledger.tasks, maps)
    caption = (
        f"Share of each task's tokens that chose each expert, on the validation images of step {step:,}. Tasks stand "
        "in one order everywhere, similar users side by side; experts are ordered per layer so that squads show as "
        "blocks. I is the mutual information of tasks and experts in nats."
    )
    return html.Section(title=title, caption=caption, body=html.picture(folder / "experts.png", title))
