"""The folder of docs/own_data.md, cut from a real photo with depth."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.data_pipeline.real_photos import normals_of, photos

SCENES = ("attic", "barn", "cellar", "den", "foyer", "garage", "kitchen", "loft")
FRAMES = 2
WHITE, RED, GREEN = (255, 255, 255), (255, 0, 0), (0, 255, 0)


def write_house(folder: Path) -> Path:
    """Write eight scenes of two frames; the second frame of a scene has a depth alone, and one scene nothing at all."""
    shelf = photos()["shelf/whole"]
    assert shelf.depth is not None
    assert shelf.objects is not None
    lines = ["file,kind"]
    for number, scene in enumerate(SCENES):
        for frame in range(FRAMES):
            photo = shelf.cut(np.s_[25 * number : 25 * number + 200], np.s_[150 * frame : 150 * frame + 301])
            assert photo.depth is not None
            assert photo.objects is not None
            name = f"{scene}/{frame:02d}"
            lines.append(f"{name},{'shop' if number % 2 else 'workshop'}")
            _save(folder / "photos" / f"{name}.jpg", photo.rgb)
            if scene == SCENES[-1]:
                continue
            millimetres = np.nan_to_num(1000.0 * photo.depth).clip(max=65535).round().astype(np.uint16)
            _save(folder / "depth" / f"{name}.png", millimetres)
            if frame == 0:
                colours = np.zeros((*photo.objects.shape, 3), np.uint8)
                colours[photo.objects > 0] = RED
                colours[photo.objects > 4] = GREEN
                colours[:5] = WHITE
                _save(folder / "objects" / f"{name}.png", colours)
                path = folder / "normals" / f"{name}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, normals_of(photo.depth, photo.focal) * np.float32([1, -1, -1]))  # as graphics have it
    (folder / "scenes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
