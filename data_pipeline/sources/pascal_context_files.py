"""Which files of a PASCAL_MT folder belong to which image, and what they hold.

The folder is that of ASTMT ("Attentive Single-Tasking of Multiple Tasks", CVPR 2019), which M3ViT and others read too:
photos and segmentations of PASCAL VOC, label maps of PASCAL-Context, parts of PASCAL-Part, and saliency and normals
distilled from networks. Every label has its image's size.
"""

import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from configs.errors import UserError
from data_pipeline.bounded import image_pixels
from data_pipeline.sample import AnyArray
from data_pipeline.source import Problem
from data_pipeline.sources.matlab import load_variable
from data_pipeline.sources.raw_file import RawFile

Split = Literal["train", "val"]

IMAGES = "rgb"
LABEL_MAP = "edges"
"""The label whose file is also the class map that says where normals hold."""
# Where a file of each kind lies, the first folder that has one counting, and its suffix.
_PLACES = {
    IMAGES: (("JPEGImages",), "jpg"),
    "semseg": (("semseg/VOC12", "semseg/pascal-context"), "png"),
    "human_parts": (("human_parts",), "mat"),
    "saliency": (("sal_distill",), "png"),
    "normals": (("normals_distill",), "png"),
    LABEL_MAP: (("pascal-context/trainval",), "mat"),
}

_CONTEXT_CLASSES = 459
_PERSON = 15
# Names of PASCAL-Part by their place in `configs.tasks.HUMAN_PARTS`; l and r are left and right.
_PART_NAMES = {
    1: ("head", "hair", "mouth", "nose", "leye", "reye", "lear", "rear", "lebrow", "rebrow"),
    2: ("torso", "neck"),
    3: ("luarm", "ruarm"),
    4: ("llarm", "rlarm", "lhand", "rhand"),
    5: ("luleg", "ruleg"),
    6: ("llleg", "rlleg", "lfoot", "rfoot"),
}
_PART_IDS = {name: part for part, names in _PART_NAMES.items() for name in names}


@dataclass(slots=True)
class Entry:
    """One image of a split and its files.

    Attributes:
        name: as in the split's list; also the stem of every file.
        files: `IMAGES` or the name of a task -> its file.
        repeated: further files of a kind that `files` has already.
    """

    name: str
    files: dict[str, RawFile] = field(default_factory=dict)
    repeated: list[tuple[str, RawFile]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Key of the sample: the name, with `-` for what a key cannot hold."""
        return re.sub(r"[^A-Za-z0-9_-]", "-", self.name)


def find_images(root: Path, split: Split) -> tuple[list[Entry], list[Problem]]:
    """Find the images of a split and their files; none is opened.

    Returns:
        The images in the order of the list; and the lines that name one again.

    Raises:
        UserError: no such folder, one that cannot be read, no usable list, none of its images, or two names that become
            the same key.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give the one that holds JPEGImages and ImageSets")
    names, problems = _read_split(root / "ImageSets" / "Context" / f"{split}.txt")
    found = {
        kind: [_list_folder(root / folder, suffix) for folder in folders] for kind, (folders, suffix) in _PLACES.items()
    }
    entries = [Entry(name) for name in names]
    for entry in entries:
        for kind, folders in found.items():
            files = next((folder[entry.name] for folder in folders if entry.name in folder), [])
            if files:
                entry.files[kind] = files[0]
                entry.repeated += [(kind, extra) for extra in files[1:]]
    if not any(IMAGES in entry.files for entry in entries):
        raise UserError(f"{root / 'JPEGImages'} holds none of the {len(entries)} images of split '{split}': extract it")
    _check_keys(entries)
    return entries, problems


def place_of(kind: str) -> str:
    """Return where files of a kind are looked for, for messages."""
    folders, suffix = _PLACES[kind]
    return " or ".join(f"{folder}/*.{suffix}" for folder in folders)


def read_codes(file: RawFile) -> NDArray[np.uint8]:
    """Return (H, W) uint8: the values of an 8-bit grey PNG, or the ids of one with a palette, as VOC's annotations are.

    Raises:
        UserError: the file cannot be read, is damaged, or is another kind of picture.
    """
    _check_suffix(file, "png")
    data = file.read()
    try:
        image_pixels("png", data)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            mode, codes = image.mode, np.asarray(image)
    except Exception as error:  # Fed with damaged bytes, decoders raise anything.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the file is damaged ({reason}): restore it") from None
    if mode not in ("L", "P"):
        raise UserError(f"the file is a PNG of mode {mode}, but must be 8-bit grey or have a palette")
    return codes


def read_label_map(file: RawFile) -> NDArray[np.int32]:
    """Return (H, W) int32: the class of PASCAL-Context, 1 to 459, or 0 for none.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something else.
    """
    stored = _load_variable(file, "LabelMap")
    if stored.ndim != 2 or stored.dtype.kind not in "uif":
        raise UserError(f"LabelMap is {stored.dtype} of shape {stored.shape}, but must be numbers of shape (H, W)")
    if not np.isin(stored, np.arange(_CONTEXT_CLASSES + 1)).all():
        raise UserError(f"LabelMap holds values that are no class, which are 0 to {_CONTEXT_CLASSES}")
    return stored.astype(np.int32)


def read_parts(file: RawFile, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Return (H, W) uint8: the part of a person, as `configs.tasks.HUMAN_PARTS` counts them, 0 for everything else.

    People without annotated parts are background, as in the benchmark. Of parts that overlap the later one counts.

    Args:
        file: `anno` of PASCAL-Part, its second field the objects, of fields (class name, class, mask, parts), and parts
            of fields (name, mask).
        shape: (H, W) of the image.

    Raises:
        UserError: the file cannot be read, is damaged, holds something else, a part of an unknown name, or a mask of
            another shape.
    """
    annotation = _load_variable(file, "anno")
    try:
        masks = list(_parts_of_people(annotation))
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UserError("anno does not hold objects with parts, as PASCAL-Part has them") from None
    parts = np.zeros(shape, np.uint8)
    for name, mask in masks:
        if name not in _PART_IDS:
            raise UserError(f"a person has a part '{name}', but known are {', '.join(_PART_IDS)}")
        check_shape(mask, shape)
        if mask.dtype.kind not in "buif":
            raise UserError(f"the mask of part '{name}' is {mask.dtype}, but must be numbers")
        parts[mask != 0] = _PART_IDS[name]
    return parts


def check_shape(label: AnyArray, shape: tuple[int, int]) -> None:
    """Raise `UserError` unless a plane of a label has the image's `shape` (H, W)."""
    if label.shape != shape:
        raise UserError(f"the label is of shape {label.shape}, the image {shape}")


def _read_split(path: Path) -> tuple[list[str], list[Problem]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"the split's list {path} cannot be read ({error.strerror}): extract it") from None
    except UnicodeDecodeError:
        raise UserError(f"the split's list {path} is not UTF-8 text: restore it") from None
    names: dict[str, None] = {}
    problems = []
    for name in filter(None, map(str.strip, lines)):
        if name in names:
            problems.append(Problem(name, "", "the split's list names it twice; it is used once", str(path)))
        else:
            names[name] = None
    if not names:
        raise UserError(f"the split's list {path} names no image: restore it")
    return list(names), problems


def _list_folder(folder: Path, suffix: str) -> dict[str, list[RawFile]]:
    """Files by stem, those with the expected suffix first; of any format, so that a wrong one is noticed."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror}): mend it, or move it away") from None
    files: dict[str, list[RawFile]] = {}
    for name in names:
        if not name.startswith("."):
            files.setdefault(PurePath(name).stem, []).append(RawFile(str(folder / name)))
    for same in files.values():
        same.sort(key=lambda file: file.suffix != suffix)
    return files


def _check_keys(entries: Iterable[Entry]) -> None:
    owner: dict[str, str] = {}
    for entry in entries:
        if (other := owner.setdefault(entry.key, entry.name)) != entry.name:
            raise UserError(f"'{other}' and '{entry.name}' would share the sample key {entry.key}: rename one of them")


def _parts_of_people(annotation: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    for thing in annotation.flat[0][1].flat:
        if int(thing[1].flat[0]) == _PERSON:
            for part in thing[3].flat:
                yield str(part[0].flat[0]), np.asarray(part[1])


def _load_variable(file: RawFile, name: str) -> NDArray[Any]:
    _check_suffix(file, "mat")
    return load_variable(file.read(), name)


def _check_suffix(file: RawFile, suffix: str) -> None:
    if file.suffix != suffix:
        raise UserError(f"the file has format '{file.suffix}', but must be {suffix}")
