"""Views are kept in few bytes, and come back as they were added."""

import random

import pytest

from data_pipeline.sources.raw_file import RawFile
from data_pipeline.sources.taskonomy_views import CollectedViews, View, Views

FILES = [
    ("b", 10, 2, "rgb", RawFile("/data/rgb/b/point_10_view_2_domain_rgb.png")),
    ("b", 10, 2, "normal", RawFile("/data/b_normal.tar", "normal/point_10_view_2_domain_normal.png", 1536, 77)),
    ("b", 9, 0, "normal", RawFile("/data/b_normal.tar", "normal/point_9_view_0_domain_normal.png", 2**40, 2**33)),
    ("b", 9, 0, "rgb", RawFile("/data/rgb/b/point_009_view_00_domain_rgb.JPG")),
    ("a.1", 7, 1, "rgb", RawFile("/data/point_7_view_1/rgb/a.1/point_7_view_1_domain_rgb.png")),
    ("", 10**17, 1, "rgb", RawFile(f"/data/rgb/point_{10**17}_view_1_domain_rgb.png")),
]
AGAIN = ("b", 10, 2, "rgb", RawFile("/data/b_rgb/rgb/point_10_view_2_domain_rgb.png"))


@pytest.mark.parametrize("seed", range(4))
def test_views_come_back_in_order_with_their_files(seed: int) -> None:
    collected = CollectedViews(("rgb", "normal", "reshading"))
    for file in (*random.Random(seed).sample(FILES, len(FILES)), AGAIN):
        collected.add(*file)
    views = Views(collected)
    expected: dict[tuple[str, int, int], View] = {}
    for building, point, view, domain, raw in sorted(FILES, key=lambda file: file[:3]):
        found = expected.setdefault((building, point, view), View(building, point, view))
        found.files[domain] = raw
    expected["b", 10, 2].repeated.append((AGAIN[3], AGAIN[4]))
    assert list(views) == views[0:9] == list(expected.values())
    assert [views.summary(number) for number in range(4)] == [(view.key, sorted(view.files)) for view in views]
    assert views.buildings == ["", "a.1", "b"]


def test_a_view_takes_little_room() -> None:
    domains = [f"domain{number}" for number in range(15)]
    collected = CollectedViews(domains)
    for point in range(200):
        for domain in domains:
            collected.add("b", point, 0, domain, RawFile(f"/data/{domain}/b/point_{point}_view_0_domain_{domain}.png"))
    assert len(collected.names) == len(domains), "paths of a domain are kept once"
    assert sum(files.itemsize * len(files) for files in collected.files.values()) <= 200 * 15 * 4
