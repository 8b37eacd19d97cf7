"""Where the camera stands: clear of things, looking at what makes the room what it is, with nothing close before it."""

import math
from random import Random

import numpy as np

from data_pipeline.rooms.camera import Camera
from data_pipeline.rooms.scene import Floats, Kind, Point, Solids
from data_pipeline.rooms.scene_types import Room
from data_pipeline.rooms.tracing import first_hits

_PROPOSALS = 48
_TRIALS = 3
_TRIAL_SIZE = 15
_CLEARANCE = 0.45  # metres from the eye to anything but the room's faces


def choose_camera(room: Room, solids: Solids, rng: Random) -> Camera:
    """The best of a few random cameras.

    Proposals that are clear of things are ranked by the sights in front of them; the best are tried at a very low
    resolution and scored by how much furniture they see and how near and how plain the view is.
    """
    proposals = [_propose(room, rng) for _ in range(_PROPOSALS)]
    room_to_stand = _distance_to_things(solids, np.stack([camera.position for camera in proposals]))
    sights = [sum(_in_view(camera, point) for point in room.sights) for camera in proposals]
    order = sorted(range(_PROPOSALS), key=lambda k: (min(room_to_stand[k], _CLEARANCE), sights[k]), reverse=True)
    return max((proposals[k] for k in order[:_TRIALS]), key=lambda camera: _score(solids, camera))


def _propose(room: Room, rng: Random) -> Camera:
    """A camera at the height of a standing or sitting person's eyes that looks towards one of the sights."""
    plan = room.plan
    eye = (
        rng.uniform(-0.92, 0.92) * (plan.half_width - 0.1),
        rng.uniform(-0.95, 0.95) * (plan.half_depth - 0.1),
        rng.uniform(1.1, 1.65),
    )
    sight = rng.choice(room.sights)
    target = (
        0.75 * sight[0] + rng.uniform(-0.2, 0.2) * plan.half_width,
        0.75 * sight[1] + rng.uniform(-0.2, 0.2) * plan.half_depth,
        0.5 * sight[2] + rng.uniform(0.15, 0.55),
    )
    if math.dist(eye[:2], target[:2]) < 0.8:
        target = (-eye[0] * 0.5, -eye[1] * 0.5 + 0.01, 0.8)
    return Camera.looking_at(eye, target, rng.uniform(58, 82))


def _distance_to_things(solids: Solids, points: Floats) -> Floats:
    """Distance of each point (N, 3) to the nearest bounding box of a solid; 0 inside one."""
    things = solids.kind != Kind.SHELL
    offset = points[:, None] - solids.centre[things]
    local = np.einsum("pkx,npx->npk", solids.axes[things], offset)
    beyond = np.maximum(np.abs(local) - solids.extent[things], 0)
    distance: Floats = np.sqrt((beyond * beyond).sum(-1)).min(1)
    return distance


def _in_view(camera: Camera, point: Point) -> bool:
    """Whether a point lies well inside the picture, at a good distance."""
    offset = np.array(point, np.float32) - camera.position
    ahead = float(offset @ camera.forward)
    if ahead < 0.7:
        return False
    return all(abs(float(offset @ axis)) < 0.8 * ahead * camera.tangent for axis in (camera.right, camera.up))


def _score(solids: Solids, camera: Camera) -> float:
    """How good a view is: objects seen, less what is too near or mere wall."""
    depth, seen = first_hits(solids, camera.grid(_TRIAL_SIZE))
    objects, counts = np.unique(solids.object[seen], return_counts=True)
    building = solids.object[:6]
    furniture = ~np.isin(objects, building)
    share = counts / counts.sum()
    largest = share[furniture].max(initial=0.0)
    return float(
        np.minimum(np.sqrt(share[furniture]), 0.35).sum()
        - 2.0 * (depth < 1.1).mean()
        - 1.5 * max(0.0, largest - 0.35)
        - 1.0 * max(0.0, 1.8 - float(np.median(depth)))
    )
