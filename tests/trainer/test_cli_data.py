"""`modsquad data` says what it did in whole lines, paths as they are."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.index import ShardIndex
from tests.data_pipeline.sources import FaultySource
from trainer.cli_data import app, pack_with_progress


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", ["[red]a[", "a{b}", "[/a]", "long" * 50])
def test_a_packing_tells_what_it_wrote_and_left_out(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    report = pack_with_progress(FaultySource(3), out, workers=1, samples_per_shard=8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"{out}: 3 samples in 1 shards"
    assert lines[-1].startswith(f"left out: 2 labels or samples, listed in {out / 'problems.jsonl'} ")
    assert lines[-1].endswith(str(report.problems[0]))


def test_make_check_index_and_show(tmp_path: Path) -> None:
    folder, png = tmp_path / "rooms", tmp_path / "sheet.png"
    run("rooms", folder, "--images", "3", "--size", "32", "--seed", "4", "--workers", "1", "--samples-per-shard", "2")
    assert len(ShardIndex.load(folder)) == 3
    assert "3 samples of 32 x 32 pixels in 2 shards" in run("check", folder)
    assert run("show", folder, png, "--count", "2", "--tasks", "normal, depth_zbuffer") == f"wrote {png}\n"
    assert png.stat().st_size
    (folder / "pack.json").unlink()
    (folder / "index.json").unlink()
    assert run("index", folder) == f"{folder}: 3 samples indexed\n"
