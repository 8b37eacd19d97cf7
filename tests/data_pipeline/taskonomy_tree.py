"""Small Taskonomy folders in the published layouts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def write(path: Path, array: NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def rgb(side: int = 12) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)


def depth(side: int = 12) -> NDArray[np.uint16]:
    codes = np.random.default_rng(1).integers(300, 5000, (side, side)).astype(np.uint16)
    codes[:3] = 65535
    return codes


SCENE = np.full((1, 365), 1 / 365, np.float64)
# Where the files of one view lie in the published layouts: domain -> path, of which "{}" is the file's own name.
LAYOUTS: dict[str, Mapping[str, str]] = {
    "components": {
        domain: f"{domain}/taskonomy/allensville/{{}}" for domain in ("rgb", "depth_zbuffer", "class_scene")
    },
    "buildings": {domain: f"{domain}/allensville/{{}}" for domain in ("rgb", "depth_zbuffer", "class_scene")},
    "extracted tars": {
        domain: f"allensville_{domain}/{domain}/{{}}" for domain in ("rgb", "depth_zbuffer", "class_scene")
    },
    "one building": {domain: f"{domain}/{{}}" for domain in ("rgb", "depth_zbuffer", "class_scene")},
}


def write_view(root: Path, layout: str, point: int, view: int) -> None:
    arrays: dict[str, NDArray[Any]] = {"rgb": rgb(), "depth_zbuffer": depth(), "class_scene": SCENE}
    named = {"class_scene": "class_places"}
    for domain, place in LAYOUTS[layout].items():
        suffix = "npy" if domain == "class_scene" else "png"
        name = f"point_{point}_view_{view}_domain_{named.get(domain, domain)}.{suffix}"
        write(root / place.format(name), arrays[domain])
