"""PASCAL_MT folders to shards; the source stays as it is."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from configs.errors import UserError
from configs.tasks import TASKS
from data_pipeline.index import ShardIndex
from data_pipeline.pack import pack
from data_pipeline.sample import Sample
from data_pipeline.show import load_target
from data_pipeline.sources.pascal_context import PascalContextSource
from tests.data_pipeline.pascal_tree import (
    FILES,
    annotate,
    cut,
    half,
    ids,
    source,
    two_images,
    write_image,
    write_split,
)
from trainer.cli.data import app


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One image in the training split, and one in the other."""
    return two_images(tmp_path / "PASCAL_MT")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_the_command_line_to_a_contact_sheet(root: Path) -> None:
    write_image(root, "Straße 7")
    write_split(root, "train", "2008_000008", "Straße 7", "2010_001001")
    annotate(root, "2010_001001")
    cut(root / FILES["saliency"].format("Straße 7"))
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = digests(root)
    out, png = root.parent / "mit Umlaut ä", root.parent / "sheet.png"
    options = (
        "--split",
        "train",
        "--size",
        "16",
        "--workers",
        "2",
        "--samples-per-shard",
        "2",
        "--image-codec",
        "jpeg",
    )
    fact = "official split train: 3 images listed (published: 4998), 3 of them in the source folder"
    output = run("pack", "pascal-context", root, out, *options)
    assert f"{out}: 3 samples in 2 shards" in output
    assert "left out: 1 labels" in output
    assert fact in output.splitlines()
    (line,) = (out / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["task"] == "saliency"
    assert json.loads(line)["path"] == str(root / FILES["saliency"].format("Straße 7"))
    report = run("check", out)
    assert "3 samples of 16 x 16 pixels in 2 shards" in report
    assert "left out: 1 of saliency" in report
    assert fact in " ".join(report.split())
    run("show", out, png)
    assert Image.open(png).size == (6 * 134 + 6, 20 + 3 * 134 + 6)
    assert digests(root) == before
    index = ShardIndex.load(out)
    available = dict(zip(index.keys, index.available(["human_parts", "saliency"]).tolist(), strict=True))
    assert available == {"2008_000008": [True, True], "Stra-e-7": [True, False], "2010_001001": [False, True]}
    semseg = load_target(index, index.keys.index("2008_000008"), TASKS["semseg"])
    np.testing.assert_array_equal(semseg.mask[0, 0].numpy(), half(ids()) != 255)
    with pytest.raises(UserError, match=r"Straße 7.*damaged"):
        run("pack", "pascal-context", root, out, *options, "--strict")
    with pytest.raises(UserError, match="which stays as it is"):
        run("pack", "pascal-context", root, root / "shards", *options)


def test_strict_stops_at_the_first_problem(root: Path) -> None:
    cut(root / FILES["edges"].format("2008_000008"))
    with pytest.raises(UserError, match=r"2008_000008, normals"):
        pack(source(root), root.parent / "out", strict=True)
    assert not (root.parent / "out" / "index.json").exists()


def test_a_packing_that_stopped_goes_on_and_gives_the_same_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"2008_{number:06d}" for number in range(4)]
    for name in names:
        write_image(root, name)
    write_split(root, "train", *names)
    whole, stopped = root.parent / "whole", root.parent / "stopped"
    pack(source(root), whole, samples_per_shard=1)
    read: list[str] = []
    original = PascalContextSource.__getitem__

    def stop_at_third(images: PascalContextSource, index: int) -> Sample:
        sample = original(images, index)
        read.append(sample.key)
        if len(read) == 3:
            raise KeyboardInterrupt
        return sample

    monkeypatch.setattr(PascalContextSource, "__getitem__", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        pack(source(root), stopped, samples_per_shard=1)
    assert pack(source(root), stopped, samples_per_shard=1).samples == 4
    assert read == [*names[:3], *names[2:]]
    assert digests(stopped) == digests(whole)


def test_a_folder_that_cannot_be_read_is_not_skipped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listdir = os.listdir

    def forbidden(path: Path) -> list[str]:
        if path == root / "sal_distill":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", forbidden)  # Root may read everything, so no mode would do.
    with pytest.raises(UserError, match=r"folder .*sal_distill cannot be read \(Permission denied\)"):
        source(root)
