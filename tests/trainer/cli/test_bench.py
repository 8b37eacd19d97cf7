"""`modsquad bench` as a user starts it, on small sizes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from trainer.bench.limits import LIMITS
from trainer.bench.suite import PARTS
from trainer.cli.bench import Part
from trainer.cli.main import app

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a run of all parts prints, and its bench.json."""
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, "-m", "trainer.cli", "bench", "--quick", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_every_comparison_has_times_and_ratios(everything: tuple[str, dict[str, Any]]) -> None:
    printed, results = everything
    for comparison in results["comparisons"]:
        rows = [comparison["reference"], *comparison["rows"]]
        assert comparison["title"] in " ".join(printed.split())
        assert all(row["name"] in printed for row in rows)
        for row in rows:
            if row["timing"]:
                assert (
                    row["timing"]["ratio"]["low"] <= row["timing"]["ratio"]["median"] <= row["timing"]["ratio"]["high"]
                )
                assert row["timing"]["milliseconds"]["median"] > 0
            else:
                assert comparison["name"] == "pairs" or row["note"] or row["moved_bytes"]


def test_every_limit_finds_its_row(everything: tuple[str, dict[str, Any]]) -> None:
    _, results = everything
    rows = {
        (comparison["name"], comparison["dtype"], row["name"])
        for comparison in results["comparisons"]
        for row in comparison["rows"]
    }
    assert {(limit.comparison, limit.dtype, limit.row) for limit in LIMITS} <= rows


def test_small_sizes_are_not_judged(everything: tuple[str, dict[str, Any]]) -> None:
    printed, results = everything
    assert len(results["limits"]) == len(LIMITS)
    assert {limit["met"] for limit in results["limits"]} == {None}
    assert f"not measured: {len(LIMITS)} limits of {len(LIMITS)}" in printed


def test_memory_grows_with_pairs(everything: tuple[str, dict[str, Any]]) -> None:
    _, results = everything
    for comparison in results["comparisons"]:
        if comparison["name"] == "pairs":
            saved = [row["saved_bytes"] for row in (comparison["reference"], *comparison["rows"])]
            assert saved[2] == pytest.approx(4 * saved[0], rel=0.05)


def test_the_machine_is_in_the_file(everything: tuple[str, dict[str, Any]]) -> None:
    _, results = everything
    machine = results["machine"]
    assert machine["torch"].startswith("2.")
    assert machine["cores"] >= 1
    assert machine["peers"]["deepspeed"]
    assert machine["environment"]["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    assert results["settings"] == {"threads": 1, "rounds": 1, "quick": True, "run": None}


@pytest.fixture
def threads_restored() -> Iterator[None]:
    """Put torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_restored")
def test_one_part_in_one_precision_on_two_threads(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["bench", "attention", "--dtype", "bf16", "--threads", "2", "--quick", "--rounds", "1", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert torch.get_num_threads() == 2
    results = json.loads(out.read_text())
    assert [(table["name"], table["dtype"]) for table in results["comparisons"]] == [("attention", "bf16")]
    assert results["settings"]["threads"] == 2


def test_the_command_offers_every_part() -> None:
    assert [part.value for part in Part] == list(PARTS)
