"""Visibility: which solid each camera sample sees, and how much of a light each point sees.

Samples are cut into tiles of 64. Solids are matched with the tiles they can touch, and each kind of solid is then
intersected in one go for all its (solid, tile) pairs, so there is no loop over solids.

Shape legend: P solids, T tiles, K pairs, R = 64 rays a tile.
"""

from collections.abc import Iterator

import numpy as np

from data_pipeline.rooms.camera import SampleGrid
from data_pipeline.rooms.primitives import MISS, intersect
from data_pipeline.rooms.scene import Bools, Floats, Ints, Kind, Solids
from data_pipeline.sample import AnyArray

_TILE = 8
_CHUNK = 256  # pairs intersected at once: 16 k rays, which stay in a core's cache
_CLOSE = 0.02  # metres; solids that come nearer to the camera plane are tested against every tile


def first_hits(solids: Solids, grid: SampleGrid) -> tuple[Floats, Ints]:
    """Depth along the camera's axis (metres) and index of the solid that each sample of the grid sees."""
    depth, seen = _room_hits(solids, grid)
    height, width = depth.shape
    tile, solid = _screen_pairs(solids, grid)
    if len(tile) == 0:
        return depth, seen
    tiles_across = -(-width // _TILE)
    order = np.argsort(tile, kind="stable")
    tile, solid = tile[order], solid[order]
    t_KR = _pair_hits(solids, grid, tile, solid, tiles_across)
    starts = np.flatnonzero(np.r_[True, tile[1:] != tile[:-1]])
    nearest_TR = np.minimum.reduceat(t_KR, starts, axis=0)
    counts = np.diff(np.r_[starts, len(tile)])
    candidates = np.where(t_KR == np.repeat(nearest_TR, counts, axis=0), solid[:, None], np.int32(2**30))
    solid_TR = np.minimum.reduceat(candidates, starts, axis=0)

    rows, columns = tile[starts] // tiles_across, tile[starts] % tiles_across
    full_depth = np.full((-(-height // _TILE), tiles_across, _TILE, _TILE), MISS, np.float32)
    full_solid = np.zeros(full_depth.shape, np.int32)
    full_depth[rows, columns] = nearest_TR.reshape(-1, _TILE, _TILE)
    full_solid[rows, columns] = solid_TR.reshape(-1, _TILE, _TILE)
    full_depth, full_solid = (
        a.transpose(0, 2, 1, 3).reshape(a.shape[0] * _TILE, -1)[:height, :width] for a in (full_depth, full_solid)
    )
    closer = full_depth < depth
    return np.where(closer, full_depth, depth), np.where(closer, full_solid, seen)


def _room_hits(solids: Solids, grid: SampleGrid) -> tuple[Floats, Ints]:
    """Depth and face at which each sample leaves the (convex) room."""
    origin = grid.camera.position - solids.centre[0]
    directions = np.moveaxis(grid.directions(), -1, 0)
    safe = np.where(np.abs(directions) < 1e-9, np.float32(1e-9), directions)
    wall = np.where(safe > 0, solids.half[:, None, None], -solids.half[:, None, None])
    leave = (wall - origin[:, None, None]) / safe
    axis = leave.argmin(0)
    depth = np.take_along_axis(leave, axis[None], axis=0)[0]
    positive = np.take_along_axis(safe, axis[None], axis=0)[0] > 0
    return depth, (2 * axis + positive).astype(np.int32)


def _screen_pairs(solids: Solids, grid: SampleGrid) -> tuple[Ints, Ints]:
    """All (tile, solid) pairs in which the solid's bounding box may cover a part of the tile."""
    camera = grid.camera
    height, width = len(grid.row), len(grid.column)
    index = np.flatnonzero(solids.kind != Kind.SHELL)
    signs = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], np.float32)
    reach = signs[None] * solids.extent[index, None]
    corners = solids.centre[index, None] - camera.position + np.einsum("pck,pkx->pcx", reach, solids.axes[index])
    ahead = corners @ camera.forward
    safe = np.maximum(ahead, _CLOSE)
    x = corners @ camera.right / (safe * camera.tangent)
    y = -corners @ camera.up / (safe * camera.tangent)
    straddles = (ahead.min(1) < _CLOSE)[:, None]
    bounds = np.stack([x.min(1), x.max(1), y.min(1), y.max(1)], 1)
    bounds = np.clip(np.where(straddles, np.array([-1, 1, -1, 1], np.float32), bounds), -2, 2)
    half_columns, half_rows = (width - 1) / 2, (height - 1) / 2
    # One sample of margin on each side covers the half-pixel shift of odd rows and rounding.
    left = np.floor((bounds[:, 0] + 1) * half_columns - 1).astype(np.int64)
    right = np.ceil((bounds[:, 1] + 1) * half_columns + 1).astype(np.int64)
    top = np.floor((bounds[:, 2] + 1) * half_rows - 1).astype(np.int64)
    bottom = np.ceil((bounds[:, 3] + 1) * half_rows + 1).astype(np.int64)
    visible = (ahead.max(1) > _CLOSE) & (right >= 0) & (left < width) & (bottom >= 0) & (top < height)
    left, right = (np.clip(a[visible], 0, width - 1) // _TILE for a in (left, right))
    top, bottom = (np.clip(a[visible], 0, height - 1) // _TILE for a in (top, bottom))
    across = right - left + 1
    counts = across * (bottom - top + 1)
    owner = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    row, column = top[owner] + within // across[owner], left[owner] + within % across[owner]
    tile = row * -(-width // _TILE) + column
    return tile.astype(np.int32), index[visible][owner].astype(np.int32)


def _pair_hits(solids: Solids, grid: SampleGrid, tile: Ints, solid: Ints, tiles_across: int) -> Floats:
    """(K, R) depth at which the rays of each pair's tile enter its solid."""
    rows = _tiles_of(grid.row)
    columns = _tiles_of(grid.column)
    t_KR = np.empty((len(tile), _TILE * _TILE), np.float32)
    origins = np.einsum("pkx,px->pk", solids.axes, grid.camera.position - solids.centre)
    for kind, pick in _chunks(solids.kind[solid]):
        s = solid[pick]
        axes = solids.axes[s]
        row = np.einsum("pkx,pix->kpi", axes, rows[tile[pick] // tiles_across])
        column = np.einsum("pkx,pjx->kpj", axes, columns[tile[pick] % tiles_across])
        direction = row[..., None] + column[:, :, None]
        origin = origins[s].T[:, :, None, None]
        dims = solids.dims[s].T[:, :, None, None]
        t_KR[pick] = intersect(kind, origin, direction, dims).reshape(len(pick), -1)
    return t_KR


def _tiles_of(line: Floats) -> Floats:
    """(tiles, 8, 3): a row or column of the grid cut into tiles, the last entry repeated to fill the last tile."""
    padding = -len(line) % _TILE
    return np.concatenate([line, np.repeat(line[-1:], padding, axis=0)]).reshape(-1, _TILE, 3)


def _chunks(kinds: Ints) -> Iterator[tuple[Kind, Ints]]:
    for kind in Kind:
        members = np.flatnonzero(kinds == kind)
        for start in range(0, len(members), _CHUNK):
            yield kind, members[start : start + _CHUNK].astype(np.int32)


def light_visibility(solids: Solids, points: Floats, lit: Bools, lights: Floats) -> Floats:
    """Whether each point sees its sample of an area light: (H, W) float32 of 0 and 1.

    Args:
        solids: the scene.
        points: (H, W, 3) float32, a little above the surfaces.
        lit: (H, W), which points face the light at all; the others are not tested and get 0.
        lights: (16, 3) float32 samples of the light's surface; the point at row i, column j uses number
            4 (i % 4) + j % 4, so averaging over any 4 x 4 window covers the whole light.
    """
    height, width = lit.shape
    padding = ((0, -height % _TILE), (0, -width % _TILE))
    points_TSR = _light_tiles(np.pad(points, (*padding, (0, 0)), mode="edge"))
    lit_TSR = _light_tiles(np.pad(lit, padding)[..., None])[..., 0]
    used: Bools = lit_TSR.reshape(len(lit_TSR), -1).max(1)
    tile, solid = _shadow_pairs(solids, points_TSR, used, lights)
    hidden = np.zeros(lit_TSR.shape, bool)
    for kind, pick in _chunks(solids.kind[solid]):
        s, t = solid[pick], tile[pick]
        axes = solids.axes[s]
        origin = np.einsum("pkx,psx->kps", axes, lights[None] - solids.centre[s, None])[..., None]
        away = points_TSR[t] - lights[:, None]
        direction = np.einsum("pkx,psrx->kpsr", axes, away)
        dims = solids.dims[s].T[:, :, None, None]
        hit = intersect(kind, origin, direction, dims) < 1
        starts = np.flatnonzero(np.r_[True, t[1:] != t[:-1]])
        hidden[t[starts]] |= np.logical_or.reduceat(hit, starts, axis=0)
    visible = (lit_TSR & ~hidden).astype(np.float32)
    rows, columns = (height + padding[0][1]) // _TILE, (width + padding[1][1]) // _TILE
    image = visible.reshape(rows, columns, 4, 4, 2, 2).transpose(0, 4, 2, 1, 5, 3)
    return image.reshape(rows * _TILE, columns * _TILE)[:height, :width]


def _light_tiles(image: AnyArray) -> AnyArray:
    """(T, 16, 4, C): tiles of 8 x 8 pixels, grouped by the light sample that they use."""
    rows, columns, channels = image.shape[0] // _TILE, image.shape[1] // _TILE, image.shape[2]
    split = image.reshape(rows, 2, 4, columns, 2, 4, channels).transpose(0, 3, 2, 5, 1, 4, 6)
    return np.ascontiguousarray(split).reshape(rows * columns, 16, 4, channels)


def _shadow_pairs(solids: Solids, points_TSR: Floats, used: Bools, lights: Floats) -> tuple[Ints, Ints]:
    """Pairs in which the solid's bounding sphere meets the hull of the tile's points and the light."""
    light = lights.mean(0)
    light_radius = np.sqrt(((lights - light) ** 2).sum(1).max())
    flat = points_TSR.reshape(len(points_TSR), -1, 3)
    low, high = flat.min(1), flat.max(1)
    tile_radius = np.linalg.norm(high - low, axis=1) / 2
    index = np.flatnonzero((solids.kind != Kind.SHELL) & solids.casts)
    to_tile, to_solid = (low + high) / 2 - light, solids.centre[index] - light
    square = np.maximum((to_tile**2).sum(1), 1e-6)
    along = to_tile @ to_solid.T
    s = np.clip(along / square[:, None], 0, 1)
    apart = (to_solid**2).sum(1)[None] - 2 * s * along + s * s * square[:, None]
    radius = np.linalg.norm(solids.extent[index], axis=1)
    slack = s * tile_radius[:, None] + (1 - s) * light_radius
    tile, column = np.nonzero((apart < (radius[None] + slack) ** 2) & used[:, None])
    return tile.astype(np.int32), index[column].astype(np.int32)
