"""The five PASCAL-Context labels of a view, in the stored encodings of `configs.tasks`."""

from collections.abc import Callable, Mapping

import numpy as np
from scipy.ndimage import gaussian_filter

from data_pipeline.rooms.catalogue import CLASS_INDEX, OBJECT_CLASSES
from data_pipeline.rooms.labels_taskonomy import encode_normal
from data_pipeline.rooms.regions import boundaries
from data_pipeline.rooms.render import View
from data_pipeline.rooms.scene import Bools
from data_pipeline.sample import AnyArray

_VOID = 255
_VOC = np.array([cls.voc for cls in OBJECT_CLASSES], np.uint8)
_STRUCTURE = np.array([cls.structure for cls in OBJECT_CLASSES])
_PERSON = CLASS_INDEX["person"]


def semseg(view: View) -> AnyArray:
    """(n, n) uint8: VOC classes, 0 for everything else."""
    return _VOC[view.cls]


def human_parts(view: View) -> AnyArray:
    """(n, n) uint8: parts of people, 0 elsewhere; all 255 in a picture without people, as the benchmark has it."""
    is_person = view.cls == _PERSON
    if not is_person.any():
        return np.full(view.cls.shape, _VOID, np.uint8)
    return np.where(is_person, view.part, 0).astype(np.uint8)


def saliency(view: View) -> AnyArray:
    """(n, n) uint8: 255 on the one to three objects that stand out, by size, place and contrast; people first."""
    candidates = _salient_scores(view)
    if not candidates:
        return np.zeros(view.cls.shape, np.uint8)
    best = max(candidates.values())
    ranked = sorted(candidates, key=lambda index: -candidates[index])[:3]
    chosen = [index for index in ranked if candidates[index] > 0.6 * best]
    return np.isin(view.object, chosen).astype(np.uint8) * 255


def _salient_scores(view: View) -> dict[int, float]:
    """Score of every object that covers at least 0.8 % of the picture and is not part of the building."""
    loose = _loose(view)
    line = np.linspace(-1, 1, view.size)
    central = np.exp(-1.2 * (line[:, None] ** 2 + line[None] ** 2))
    colour = gaussian_filter(view.rgb.astype(np.float32), (1, 1, 0))
    mean = colour.mean((0, 1))
    scores = {}
    for index, count in zip(*np.unique(view.object[loose], return_counts=True), strict=True):
        share = count / loose.size
        if share < 0.008:
            continue
        mask = view.object == index
        contrast = 40 + float(np.linalg.norm(colour[mask].mean(0) - mean))
        person = 2.5 if view.cls[mask][0] == _PERSON else 1.0
        scores[int(index)] = float(np.sqrt(share) * central[mask].mean() * contrast * person)
    return scores


def normals(view: View) -> AnyArray:
    """(n, n, 3) uint8: as Taskonomy's normals; all channels 255 where unknown."""
    return np.where(view.valid[..., None], encode_normal(view.normal), np.uint8(_VOID))


def edges(view: View) -> AnyArray:
    """(n, n) uint8: 255 on boundaries between objects, and between the classes of the building's parts."""
    label = view.cls.astype(np.int64) * 65536 + np.where(_loose(view), view.object, 0)
    return boundaries(label).astype(np.uint8) * 255


def _loose(view: View) -> Bools:
    loose: Bools = ~_STRUCTURE[view.cls]
    return loose


LABELS: Mapping[str, Callable[[View], AnyArray]] = {
    label.__name__: label for label in (semseg, human_parts, saliency, normals, edges)
}
