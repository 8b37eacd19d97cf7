"""Small folders of images and labels with a description, and the samples that it leads to."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.sample import Sample
from data_pipeline.source import PartialSample, Problem
from data_pipeline.sources.folder_source import FolderSource

SIZE = 8
DEPTH = {"depth_zbuffer": {"path": "depth/{key}.png", "unit_metres": 0.001}}


def save(path: Path, array: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def image(value: int, height: int = 8, width: int = 8) -> NDArray[np.uint8]:
    return np.full((height, width, 3), value, np.uint8)


def describe(folder: Path, **values: Any) -> Path:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"rgb": "images/{key}.png", **values}, allow_unicode=True), encoding="utf-8")
    return path


def three_images(folder: Path) -> Path:
    """Three images; a depth, in millimetres, for two of them."""
    for number, name in enumerate(("a", "b", "c"), 1):
        save(folder / "images" / f"{name}.png", image(number))
        if name != "b":
            save(folder / "depth" / f"{name}.png", np.full((8, 8), 1000 * number, np.uint16))
    return folder


def samples(source: FolderSource) -> tuple[dict[str, Sample], list[Problem]]:
    """Samples by their names, and all problems."""
    found: dict[str, Sample] = {}
    problems: list[Problem] = []
    for number in range(len(source)):
        sample: Sample | None
        try:
            sample = source[number]
        except PartialSample as partial:
            sample = partial.sample
            problems += partial.problems
        if sample is not None:
            found[str(sample.meta["name"])] = sample
    return found, problems


def named(folder: Path, part: str | None = None, /, **values: Any) -> tuple[dict[str, Sample], list[Problem]]:
    return samples(FolderSource(describe(folder, **values), SIZE, part))


def write_table(folder: Path, text: str, name: str = "table.csv", encoding: str = "utf-8") -> str:
    (folder / name).write_bytes(text.encode(encoding))
    return name
