"""`modsquad data` says what it did in whole lines, paths as they are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from configs.errors import UserError
from data_pipeline.index import ShardIndex
from tests.data_pipeline.random_source import FaultySource
from trainer.cli.data import app, pack_with_progress


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


def test_rooms_as_byte_planes(tmp_path: Path) -> None:
    run("rooms", tmp_path, "--images", "1", "--size", "32", "--workers", "1", "--label-codec", "zstd")
    assert ShardIndex.load(tmp_path).suffix(0, "normal") == "plz"


def test_rooms_with_images_as_jpeg(tmp_path: Path) -> None:
    options = ("--images", "1", "--size", "32", "--workers", "1")
    run("rooms", tmp_path / "a", *options, "--image-codec", "jpeg", "--image-quality", "90")
    assert ShardIndex.load(tmp_path / "a").suffix(0, "rgb") == "jpg"
    run("rooms", tmp_path / "b", *options, "--image-codec", "webp")
    assert ShardIndex.load(tmp_path / "b").suffix(0, "rgb") == "webp"
    assert '"image_codec": "webp-95"' in (tmp_path / "b" / "pack.json").read_text()
    with pytest.raises(UserError, match="PNG has no quality"):
        run("rooms", tmp_path / "c", *options, "--image-quality", "90")


def test_an_official_split_of_taskonomy(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    for domain, dtype, shape in (("rgb", np.uint8, (16, 16, 3)), ("depth_zbuffer", np.uint16, (16, 16))):
        path = raw / domain / "allensville" / f"point_1_view_0_domain_{domain}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.zeros(shape, dtype)).save(path)
    table = tmp_path / "mine.csv"
    table.write_bytes(b"id,train,val,test\rallensville,1,0,0\rhanson,1,0,0\rmerom,0,1,0")
    options = ("--size", "16", "--workers", "1", "--split-csv", str(table))
    chosen = ("--split", "tiny", "--label-codec", "zstd", "--classes", "selected", "--image-codec", "jpeg")
    text = run("pack", "taskonomy", raw, out, *options, *chosen)
    assert "1 samples in 1 shards\nofficial split tiny, part train\ntrain: 2 buildings listed (published: 25)" in text
    assert "left out: 1 labels or samples" in text
    assert "hanson" in text
    index = ShardIndex.load(out)
    assert (index.suffix(0, "rgb"), index.suffix(0, "depth_zbuffer")) == ("jpg", "plz")
    assert "train: 2 buildings listed (published: 25)" in run("check", out)
    with pytest.raises(UserError, match="give --split too"):
        run("pack", "taskonomy", raw, tmp_path / "other", *options)
    with pytest.raises(UserError, match=r"none of the 1 buildings wanted \(merom\)"):
        run("pack", "taskonomy", raw, tmp_path / "other", *options, "--split", "tiny", "--part", "val")
    with pytest.raises(UserError, match=r"no train_val_test_tiny\.csv"):
        run("pack", "taskonomy", raw, tmp_path / "other", "--split", "tiny")
