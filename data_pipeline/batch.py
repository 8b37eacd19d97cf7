"""What the loader hands to the trainer: images and (image, task) pairs, still in stored form.

A batch is small: pixels travel as uint8 or uint16 and become floats on the device (`data_pipeline.transforms` for
geometry, `data_pipeline.targets` for values). Only the labels that the plan asked for are here.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from data_pipeline.skips import Skip


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank. B images, P pairs, T tasks of the run, S the stored side in pixels.

    Attributes:
        images: (B, 3, S, S) uint8.
        mask_valid: (B, S, S) bool; False where the sample's `mask_valid` excludes the pixel; all True without one.
        pair_image: (P,) int64, index into `images`; pairs are sorted by (task, image).
        pair_task: (P,) int64, index into the run's tasks.
        labels: task name -> stored labels of that task's pairs, in pair order: dense (p, C, S, S), vectors (p, C); p
            may be 0. Every task of the run has an entry. dtype as stored.
        global_pairs: (T,) int64, pairs of each task in the whole global batch (all ranks, all accumulation steps), so
            that a mean over it needs no communication.
        flip: (B,) bool, whether to mirror the image.
        crop: (B, 4) float32, the window to show: top, left, height, width as fractions of the side. It lies inside the
            image unless `rotation` is given.
        turns: (B, 2) int64, sample and epoch of each image, as in its slot: with the seed they fix what is drawn for
            it, whatever batch it is in.
        keys: the B sample keys.
        rotation: (B,) float32, radians by which what the window shows turns about its centre, anticlockwise as seen.
            None: no window turns or reaches beyond the image.
        photometric: name of a change of colours (`data_pipeline.photometric`) -> (B,) float32, its strength; only
            changes that the run makes.
        inside: (B, S, S) bool; False where the pixel lies outside the image and nothing is known. None: none does.
        left_out: damaged members that the plan asked for; their pairs are counted in `global_pairs`, and nowhere else.
    """

    images: Tensor
    mask_valid: Tensor
    pair_image: Tensor
    pair_task: Tensor
    labels: dict[str, Tensor]
    global_pairs: Tensor
    flip: Tensor
    crop: Tensor
    turns: Tensor
    keys: tuple[str, ...]
    rotation: Tensor | None = None
    photometric: dict[str, Tensor] = field(default_factory=dict)
    inside: Tensor | None = None
    left_out: tuple[Skip, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with all tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        for part in ("labels", "photometric"):
            moved[part] = {name: value.to(device, non_blocking=True) for name, value in getattr(self, part).items()}
        return replace(self, **moved)
