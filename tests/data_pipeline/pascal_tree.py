"""Small PASCAL_MT folders in the official encodings, for tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from configs.tasks import resolve_tasks
from data_pipeline.sample import AnyArray
from data_pipeline.sources.pascal_context import PascalContextSource
from data_pipeline.sources.pascal_context_files import Split

HEIGHT, WIDTH, SIZE = 24, 32, 16
ALL = resolve_tasks("pascal_context")
NAMES = {spec.name for spec in ALL}
PERSON, WALL, SKY = 284, 440, 360  # classes of PASCAL-Context; the benchmark knows no normals of the sky
FACING = (128, 128, 255)
FILES = {
    "rgb": "JPEGImages/{}.jpg",
    "semseg": "semseg/VOC12/{}.png",
    "human_parts": "human_parts/{}.mat",
    "saliency": "sal_distill/{}.png",
    "normals": "normals_distill/{}.png",
    "edges": "pascal-context/trainval/{}.mat",
}
Boxes = Mapping[str, tuple[slice, slice]]
BODY: Boxes = {"head": np.s_[4:8, 8:16], "torso": np.s_[8:16, 8:16], "lfoot": np.s_[20:24, 8:16]}


def box(rows: slice, columns: slice) -> NDArray[np.uint8]:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[rows, columns] = 1
    return mask


def objects(*things: tuple[int, Boxes]) -> NDArray[Any]:
    """The objects of PASCAL-Part as MATLAB stores them: a row of structs, parts being another one, or [] if none."""
    rows = []
    for index, boxes in things:
        parts = np.array([(name, box(*where)) for name, where in boxes.items()], [("part_name", "O"), ("mask", "O")])
        whole = np.ones((HEIGHT, WIDTH), np.uint8)
        rows.append((f"class {index}", index, whole, parts[None] if boxes else np.zeros((0, 0))))
    return np.array([rows], [("class", "O"), ("class_ind", "O"), ("mask", "O"), ("parts", "O")])


def write(path: Path, content: NDArray[Any] | Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Mapping):
        savemat(path, content, do_compression=True)
    else:
        Image.fromarray(content).save(path)
    return path


def write_palette(path: Path, ids: NDArray[np.uint8]) -> Path:
    """As VOC stores its annotations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids, "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(path)
    return path


def classes() -> NDArray[np.uint16]:
    """Sky above a wall, with a person in front."""
    label_map = np.full((HEIGHT, WIDTH), SKY, np.uint16)
    label_map[12:] = WALL
    label_map[4:, 8:16] = PERSON
    return label_map


def ids() -> NDArray[np.uint8]:
    """The person, in a void outline, before background."""
    codes = np.zeros((HEIGHT, WIDTH), np.uint8)
    codes[2:, 6:18] = 255
    codes[4:, 8:16] = 15
    return codes


def annotate(root: Path, name: str, *things: tuple[int, Boxes]) -> Path:
    return write(root / FILES["human_parts"].format(name), {"anno": {"imname": name, "objects": objects(*things)}})


def write_image(root: Path, name: str) -> None:
    """One image with all labels, in the official encodings."""
    ramp = np.linspace(0, 255, WIDTH).astype(np.uint8)
    write(root / FILES["rgb"].format(name), np.repeat(np.tile(ramp, (HEIGHT, 1))[:, :, None], 3, axis=2))
    write_palette(root / FILES["semseg"].format(name), ids())
    annotate(root, name, (15, BODY))
    write(root / FILES["saliency"].format(name), np.where(ids() == 15, 200, 50).astype(np.uint8))
    write(root / FILES["normals"].format(name), np.full((HEIGHT, WIDTH, 3), FACING, np.uint8))
    write(root / FILES["edges"].format(name), {"LabelMap": classes()})


def write_split(root: Path, split: str, *names: str) -> None:
    path = root / "ImageSets" / "Context" / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def two_images(folder: Path) -> Path:
    """Write one image in the training split, and one in the other."""
    for split, name in (("train", "2008_000008"), ("val", "2010_001001")):
        write_image(folder, name)
        write_split(folder, split, name)
    return folder


def source(root: Path, split: Split = "train", size: int = SIZE) -> PascalContextSource:
    return PascalContextSource(root, split, size, ALL)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def half(array: AnyArray) -> AnyArray:
    """The nearest rows of 24 and columns of 32 for 16 of each."""
    rows = (2 * np.arange(SIZE) + 1) * HEIGHT // (2 * SIZE)
    return array[rows][:, 1::2]
