"""The boundary measure of PASCAL-Context: F at the optimal dataset scale (ODS), after Martin et al., PAMI 2004.

Predicted edges are reduced to ridges by non-maximum suppression, labelled edges are thinned to one pixel. For each
threshold, ridges above it are matched one to one with the labels, a pair being allowed within 0.0075 of the image
diagonal. Matches, predicted pixels and labelled pixels are pooled over the dataset; the measure is the best F over
thresholds. The match is of maximum cardinality, where the original tool solves a minimum-cost assignment, so values
may differ from it in the third digit.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree
from torch import Tensor

from data_pipeline.targets import Target

DISTANCE_FRACTION = 0.0075
# Below a diagonal of 133 pixels the fraction is less than one pixel, finer than ridges are placed.
SHORTEST_DISTANCE = 1.0
THRESHOLDS = torch.arange(1, 20) / 20

Edges = NDArray[np.bool_]


class BoundaryF:
    """ODS F as an accumulator (see `metrics.Metric`). State: matches, predicted per threshold; labelled."""

    def __init__(self) -> None:
        self.state = torch.zeros(2 * len(THRESHOLDS) + 1, dtype=torch.float64)

    def update(self, prediction: Tensor, target: Target) -> None:
        """Match p pairs; prediction (p, 1, H, W) logits, target values 1 on edges. Masked pixels match nothing."""
        # On the CPU, where the matching is: ridges would move with a GPU's rounding of convolutions (TF32).
        scores, values, mask = prediction.float().sigmoid().cpu(), target.values.cpu(), target.mask.cpu()
        kept = ridges(scores) & mask
        labelled = thin((values > 0.5).squeeze(1)).unsqueeze(1) & mask
        for score, ridge, label in zip(scores, kept, labelled, strict=True):
            candidates = ridge & (score >= THRESHOLDS.view(-1, 1, 1))
            matches = torch.tensor([count_matches(edges, label[0].numpy()) for edges in candidates.numpy()])
            self.state += torch.cat([matches, candidates.sum(dim=(1, 2)), label.sum().view(1)])

    def compute(self) -> float | None:
        """Return the best F, 0 to 1; None without any labelled edge."""
        matches, predicted = self.state[:-1].view(2, -1)
        labelled = self.state[-1]
        if labelled == 0:
            return None
        return float((2 * matches / (predicted + labelled)).max())  # = 2 P R / (P + R)


def count_matches(predicted: Edges, labelled: Edges) -> int:
    """Return the size of a maximum one-to-one matching of two (H, W) edge maps within the allowed distance."""
    points, marks = np.argwhere(predicted), np.argwhere(labelled)
    if not len(points) or not len(marks):
        return 0
    distance = max(SHORTEST_DISTANCE, DISTANCE_FRACTION * float(np.hypot(*predicted.shape)))
    near = cKDTree(points).query_ball_tree(cKDTree(marks), distance)
    columns = np.fromiter((mark for row in near for mark in row), dtype=np.int32)
    starts = np.cumsum([0, *map(len, near)], dtype=np.int32)
    allowed = csr_array((np.ones(len(columns), dtype=bool), columns, starts), shape=(len(points), len(marks)))
    return int((maximum_bipartite_matching(allowed, perm_type="column") >= 0).sum())


def ridges(score: Tensor) -> Tensor:
    """Return where `score` (p, 1, H, W) has a maximum across the ridge through the pixel: bool (p, 1, H, W).

    The direction across is the one of most negative curvature (Hessian of the smoothed score). The comparison is
    strict on one side only: of two equal pixels side by side one stays, and flat regions have no ridge.
    """
    if score.numel() == 0:
        return score > 0
    binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    smooth = F.conv2d(F.pad(score, (2, 2, 2, 2), mode="replicate"), torch.outer(binomial, binomial)[None, None])
    dy, dx = torch.gradient(smooth, dim=(2, 3))
    dyy, dyx = torch.gradient(dy, dim=(2, 3))
    dxx = torch.gradient(dx, dim=3)[0]
    across = 0.5 * torch.atan2(2 * dyx, dxx - dyy) + torch.pi / 2
    step = torch.cat([across.cos(), across.sin()], dim=1).movedim(1, -1)
    ahead, behind = _sample_at(score, step), _sample_at(score, -step)
    return (score > behind) & (score >= ahead)


def _sample_at(score: Tensor, step: Tensor) -> Tensor:
    """Return `score` (p, 1, H, W) one `step` (p, H, W, 2: x, y in pixels) away from every pixel, bilinearly."""
    height, width = score.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([x, y], dim=-1).to(step) + step
    extent = torch.tensor([width - 1, height - 1]).to(step)
    return F.grid_sample(score, 2 * place / extent - 1, padding_mode="border", align_corners=True)


def thin(edges: Tensor) -> Tensor:
    """Thin edges to a width of one pixel without breaking or losing any: bool (n, H, W) -> bool (n, H, W).

    Guo and Hall, Communications of the ACM 32(3), 1989: the two subiterations alternate until nothing changes.
    """
    edges = edges.clone()
    while True:
        before = edges.clone()
        for table in _removable():
            edges &= ~table[_neighbour_codes(edges)]
        if torch.equal(before, edges):
            return edges


# Row and column steps to the neighbours p2 ... p9: clockwise from north.
_STEPS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


def _neighbour_codes(edges: Tensor) -> Tensor:
    """Return the 8 neighbours of every pixel as the bits of an int64, p2 lowest; pixels outside count as 0."""
    height, width = edges.shape[-2:]
    padded = F.pad(edges.to(torch.uint8), (1, 1, 1, 1))
    codes = torch.zeros_like(edges, dtype=torch.int64)
    for bit, (row, column) in enumerate(_STEPS):
        codes |= padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width].long() << bit
    return codes


@cache
def _removable() -> tuple[Tensor, Tensor]:
    """Return, for each subiteration, the bool (256,) table of neighbour codes whose centre may go."""
    p2, p3, p4, p5, p6, p7, p8, p9 = (torch.arange(256).unsqueeze(0) >> torch.arange(8).unsqueeze(1) & 1).bool()
    crossings = sum(
        (~side & (corner | after)).int()
        for side, corner, after in ((p2, p3, p4), (p4, p5, p6), (p6, p7, p8), (p8, p9, p2))
    )
    pairs = sum((a | b).int() for a, b in ((p9, p2), (p3, p4), (p5, p6), (p7, p8)))
    shifted = sum((a | b).int() for a, b in ((p2, p3), (p4, p5), (p6, p7), (p8, p9)))
    neighbours = torch.minimum(torch.as_tensor(pairs), torch.as_tensor(shifted))
    common = (torch.as_tensor(crossings) == 1) & (neighbours >= 2) & (neighbours <= 3)
    return common & ~((p2 | p3 | ~p5) & p4), common & ~((p6 | p7 | ~p9) & p8)
