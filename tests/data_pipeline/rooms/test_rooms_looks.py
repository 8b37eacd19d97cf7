"""Colours, textures, catalogue."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.tasks import VOC_CLASSES
from data_pipeline.rooms.catalogue import OBJECT_CLASSES, PLACES_INDEX
from data_pipeline.rooms.palette import oklch
from data_pipeline.rooms.scene import TEXTURES
from data_pipeline.rooms.textures import Spots, albedo


@given(lightness=st.floats(0, 1), chroma=st.floats(0, 0.3), hue=st.floats(-720, 720))
def test_colours_are_albedos(lightness: float, chroma: float, hue: float) -> None:
    assert all(0.01 <= value <= 0.97 for value in oklch(lightness, chroma, hue))


def test_oklch_of_known_colours() -> None:
    assert oklch(1.0, 0.0, 0.0) == pytest.approx((0.97, 0.97, 0.97))
    # sRGB red is L 0.62796, C 0.25768, h 29.234 in Ottosson's table.
    assert oklch(0.62796, 0.25768, 29.234) == pytest.approx((0.97, 0.01, 0.01), abs=0.01)
    gray = oklch(0.6, 0.0, 0.0)
    assert gray == pytest.approx((0.6**3,) * 3, rel=1e-3)


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_vary_but_stay_albedos(texture: str) -> None:
    n = 4096
    rng = np.random.default_rng(0)
    u, v = rng.uniform(-2, 2, (2, n)).astype(np.float32)
    one = np.ones(n, np.float32)
    ground, figure = np.full((n, 3), 0.7, np.float32), np.full((n, 3), 0.2, np.float32)
    noise = rng.random((64, 64), dtype=np.float32)

    def coloured(footprint: float) -> np.ndarray:
        return albedo(texture, Spots(u, v, ground, figure, 0.2 * one, 3 * one, footprint * one, noise))

    near, far = coloured(0.001), coloured(5.0)
    assert near.shape == (n, 3)
    assert near.dtype == np.float32
    assert near.min() >= 0
    assert near.max() < 2
    assert near.std() > 0.01
    assert far.std() <= near.std() + 0.02


def test_the_catalogue_reaches_every_voc_class() -> None:
    assert {cls.voc for cls in OBJECT_CLASSES} == set(range(len(VOC_CLASSES)))
    assert len({cls.name for cls in OBJECT_CLASSES}) == len(OBJECT_CLASSES) >= 40
    assert all(cls.imagenet is None or 0 <= cls.imagenet < 1000 for cls in OBJECT_CLASSES)
    assert len(set(PLACES_INDEX.values())) == 10
