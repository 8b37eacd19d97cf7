"""The contact sheet: its cells are where they should be and show what the shards hold."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.augmentation import AugmentConfig
from configs.errors import UserError
from configs.tasks import resolve_tasks
from data_pipeline.draws import Augment, draw_augmentations
from data_pipeline.index import ShardIndex
from data_pipeline.pack import pack
from data_pipeline.show import contact_sheet, load_target
from tests.data_pipeline.random_source import FaultySource, random_sample

TASKS = resolve_tasks(["depth_zbuffer", "normal", "class_scene"])


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Keys 0, 1, 2, 4 and 6; 1 lacks its depth, 2 and 4 their normals."""
    out = tmp_path_factory.mktemp("shards")
    pack(FaultySource(7), out, samples_per_shard=4)
    return ShardIndex.load(out)


def test_the_sheet_shows_images_labels_and_gaps(index: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    contact_sheet(index, TASKS, 5, path)
    sheet = np.asarray(Image.open(path))
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
    cell, gap, title = 128, 6, 20
    assert sheet.shape == (title + gap + 5 * (cell + gap), gap + 4 * (cell + gap), 3)

    def picture(row: int, column: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        top, left = title + gap + row * (cell + gap), gap + column * (cell + gap)
        return sheet[top : top + cell, left : left + cell]

    np.testing.assert_array_equal(picture(0, 0)[4::8, 4::8], random_sample(0).rgb)
    assert len(np.unique(picture(0, 1).reshape(-1, 3), axis=0)) > 50
    missing = picture(1, 1)
    assert (missing[2:40, 2:-2] == 255).all()
    assert missing.min() < 100, "says that there is no label"


def test_an_augmented_sheet_shows_what_training_sees(index: ShardIndex, tmp_path: Path) -> None:
    augment = Augment(3, AugmentConfig(flip=False, zoom=(0.4, 0.5), rotate_degrees=10))
    contact_sheet(index, TASKS[:2], 3, tmp_path / "sheet.png", augment)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    drawn = draw_augmentations(augment, [(0, sample) for sample in range(3)])
    rows = [sheet[26 + 134 * row : 26 + 134 * row + 128, 6:134] for row in range(3)]
    for row, (_, _, height, _) in zip(rows, drawn.crop.tolist(), strict=True):
        # A margin of middle grey around what shrank by the zoom.
        shown = (np.abs(row.astype(int) - 128) > 1).any(-1).mean()
        assert shown == pytest.approx(1 / height**2, rel=0.25)
    assert not np.array_equal(rows[0], rows[1])


def test_fewer_samples_than_rows(index: ShardIndex, tmp_path: Path) -> None:
    contact_sheet(index, TASKS[:1], 99, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height == 20 + 6 + 5 * 134


def test_mistakes_are_named(index: ShardIndex, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="count 0"):
        contact_sheet(index, TASKS, 0, tmp_path / "sheet.png")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*sheet\.png"):
        contact_sheet(index, TASKS, 1, tmp_path / "file" / "sheet.png")


def test_targets_of_shards(index: ShardIndex) -> None:
    sample = random_sample(0)
    target = load_target(index, 0, TASKS[0])
    depth = sample.labels["depth_zbuffer"]
    np.testing.assert_allclose(target.values[0, 0], np.log1p(depth.astype(np.float64)) / np.log(65536), atol=1e-6)
    assert sample.mask_valid is not None
    np.testing.assert_array_equal(target.mask[0, 0], (depth != 65535) & (sample.mask_valid > 0))
    assert load_target(index, 0, TASKS[1]).values.shape == (1, 3, 16, 16)
    assert load_target(index, 0, TASKS[2]).values.shape == (1, 365)
