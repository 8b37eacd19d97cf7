"""What a configured model costs, as comment lines below its YAML: every part with its formula, and the sums."""

from collections.abc import Mapping
from io import StringIO
from statistics import mean
from textwrap import fill

from rich.console import Console
from rich.table import Table

from configs.schema import RunConfig
from model.cost import (
    SYMBOLS,
    count_active_parameters,
    count_image_macs,
    count_macs,
    count_parameters,
    model_costs,
    model_symbols,
)


def cost_comment(config: RunConfig) -> str:
    """Return lines that start with "#": costs by part, in total, and per task, of the whole model over all ranks."""
    tasks, side = config.task_specs, config.data.image_size
    count = count_parameters(config.model, tasks, side)
    image_macs = count_image_macs(config.model, tasks, side)
    blocks = [
        "Costs: number of equal parts * formula (model/cost.py). A multiply-accumulate (MAC) is a product and a sum.\n"
        f"Of every part: {_values(model_symbols(config.model, len(tasks), side))}.\n{_legend()}",
        _text(_parts(config)),
        f"parameters: {count.total:,} = {count.dense:,} dense + {count.experts:,} experts + {count.routers:,} routers "
        f"+ {count.tasks:,} of tasks\n"
        f"MACs of one image of {side} px with all tasks: {image_macs:,}; what runs once per image is counted once",
        _text(_tasks(config)),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in "\n\n".join(blocks).splitlines())


def _parts(config: RunConfig) -> Table:
    """One row per kind of part; the MACs are those of a single pass, by one image or one (image, task) pair."""
    table = _table("part", "number >", "of each", "parameters >", "formula", "MACs >", "formula", "passes per image >")
    for row in model_costs(config.model, config.task_specs, config.data.image_size):
        table.add_row(
            row.part,
            str(row.count),
            _values(row.own),
            f"{row.parameters:,}",
            row.formula.parameters,
            f"{row.macs:,}",
            row.formula.macs,
            str(row.passes),
        )
    return table


def _tasks(config: RunConfig) -> Table:
    """One row per task and their mean: the task on its own, from pixels to prediction."""
    tasks, side = config.task_specs, config.data.image_size
    macs = [count_macs(config.model, spec, side) for spec in tasks]
    active = [count_active_parameters(config.model, spec, side) for spec in tasks]
    table = _table("task", "MACs per image >", "active parameters per token >")
    names = [spec.name for spec in tasks]
    for name, *numbers in zip(
        [*names, "mean"], [*macs, round(mean(macs))], [*active, round(mean(active))], strict=True
    ):
        table.add_row(name, *(f"{number:,}" for number in numbers))
    return table


def _table(*columns: str) -> Table:
    """An empty table; columns whose name ends in " >" stand to the right."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        name = column.removesuffix(" >")
        table.add_column(name, justify="left" if name == column else "right", no_wrap=True)
    return table


def _values(symbols: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in symbols.items())


def _legend() -> str:
    return fill("; ".join(f"{symbol} {meaning}" for symbol, meaning in SYMBOLS.items()) + ".", width=116)


def _text(table: Table) -> str:
    console = Console(file=StringIO(), width=1000, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
