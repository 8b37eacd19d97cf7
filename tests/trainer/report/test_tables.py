from rich.table import Table

from tests.trainer.run_folder import squad_summary
from trainer.report.tables import squad_table


def cells(table: Table) -> list[list[str]]:
    """The cells of a table, column by column, the header first."""
    return [[str(column.header), *map(str, column.cells)] for column in table.columns]


def test_squads_stand_side_by_side_with_a_line_per_task() -> None:
    single = squad_summary()
    unknown = single.scores[0].model_copy(update={"task": "semseg", "metric": "miou", "before": float("nan")})
    names, first, second = cells(squad_table([single, single.model_copy(update={"scores": (*single.scores, unknown)})]))
    assert dict(zip(names, first, strict=True)) == {
        "": "normal",
        "experts": "8 -> 4",
        "parameters": "2.00 M -> 900.00 k",
        "MACs per image": "50.00 M -> 50.00 M",
        "metric": "mean_angle_deg",
        "value": "30 -> 30.15",
        "relative change": "+0.500%",
        "tokens unaffected": "98.00%",
        "images unaffected": "75.00%",
    }
    assert second[0] == "normal\nsemseg"
    assert second[6] == "+0.500%\nunknown"
