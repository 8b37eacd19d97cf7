"""What the benchmark says about bytes between ranks."""

import pytest

from trainer.bench.communication import compare_communication
from trainer.bench.comparison import Comparison, Settings


@pytest.fixture(scope="module")
def tables() -> dict[str, Comparison]:
    """Every table, by its name."""
    return {table.name: table for table in compare_communication(Settings(quick=True), "bf16")}


def moved(table: Comparison) -> dict[str, int]:
    found = {row.name: row.moved_bytes for row in (table.reference, *table.rows)}
    assert all(found.values())
    return {name: count for name, count in found.items() if count}


def test_exchange_is_near_the_lower_bound(tables: dict[str, Comparison]) -> None:
    for ranks in (2, 4, 8, 16):
        found = moved(tables[f"comm ep {ranks}"])
        assert found["lower bound"] < found["exchange"] <= 1.05 * found["lower bound"]
        assert found["exchange"] <= 1.02 * found["one copy per expert"]
        assert "MB per attention layer" in tables[f"comm ep {ranks}"].rows[0].note


def test_processes_send_what_the_plan_says(tables: dict[str, Comparison]) -> None:
    found = moved(tables["comm ep 2"])
    assert found["exchange, 2 processes"] == found["exchange"]
    found = moved(tables["placement ep 2"])
    assert found["task-affine, 4 shadowed, 2 processes"] == found["task-affine, 4 shadowed"]


def test_affine_placement_moves_less(tables: dict[str, Comparison]) -> None:
    for ranks in (2, 4, 8):
        found = moved(tables[f"placement ep {ranks}"])
        assert found["task-affine"] < 0.9 * found["dealt alike"]


def test_shadowed_experts_save_bytes_and_relieve_busy_ranks(tables: dict[str, Comparison]) -> None:
    for ranks in (2, 4, 8):
        table = tables[f"placement ep {ranks}"]
        found, rows = moved(table), {row.name: row for row in table.rows}
        assert found["task-affine, 4 shadowed"] < 0.95 * found["task-affine"]
        load = rows["task-affine, 4 shadowed"].busiest
        assert load is not None
        assert 1 <= load <= 1.25
