"""Where the camera stands: on free floor, looking at what makes the room what it is, with nothing close before it."""

import math
from random import Random

import numpy as np

from data_pipeline.rooms.camera import Camera
from data_pipeline.rooms.layout import Footprint, overlaps
from data_pipeline.rooms.scene import Point, Solids
from data_pipeline.rooms.scene_types import Room
from data_pipeline.rooms.tracing import first_hits

_PROPOSALS = 24
_TRIALS = 3
_TRIAL_SIZE = 15


def choose_camera(room: Room, solids: Solids, rng: Random) -> Camera:
    """The best of a few random cameras.

    Proposals are ranked by the sights in front of them; the best are tried at a very low resolution and scored by how
    much furniture they see and how near and how plain the view is.
    """
    proposals = [_propose(room, rng) for _ in range(_PROPOSALS)]
    proposals.sort(key=lambda proposal: -proposal[0])
    cameras = [camera for _, camera in proposals[:_TRIALS]]
    return max(cameras, key=lambda camera: _score(solids, camera))


def _propose(room: Room, rng: Random) -> tuple[float, Camera]:
    """A camera and the number of sights that it would see if nothing hid them."""
    plan = room.plan
    for _ in range(20):
        eye = (
            rng.uniform(-0.92, 0.92) * (plan.half_width - 0.1),
            rng.uniform(-0.95, 0.95) * (plan.half_depth - 0.1),
            rng.uniform(1.1, 1.65),
        )
        body = Footprint(eye[0], eye[1], 0.12, 0.12, 0.0, eye[2])
        if not any(other.height > eye[2] - 0.5 and overlaps(body, other, 0.25) for other in plan.footprints):
            break
    sight = rng.choice(room.sights)
    target = (
        0.75 * sight[0] + rng.uniform(-0.2, 0.2) * plan.half_width,
        0.75 * sight[1] + rng.uniform(-0.2, 0.2) * plan.half_depth,
        0.5 * sight[2] + rng.uniform(0.15, 0.55),
    )
    if math.dist(eye[:2], target[:2]) < 0.8:
        target = (-eye[0] * 0.5, -eye[1] * 0.5 + 0.01, 0.8)
    camera = Camera.looking_at(eye, target, rng.uniform(58, 82))
    return sum(_in_view(camera, point) for point in room.sights), camera


def _in_view(camera: Camera, point: Point) -> float:
    """1 for a point well inside the picture at a good distance, less otherwise."""
    offset = np.array(point, np.float32) - camera.position
    ahead = float(offset @ camera.forward)
    if ahead < 0.7:
        return 0.0
    x, y = (abs(float(offset @ axis)) / (ahead * camera.tangent) for axis in (camera.right, camera.up))
    return 1.0 if max(x, y) < 0.8 else 0.0


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
