from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from model.extract import extract_squad
from model.mod_squad import ModSquad
from tests.trainer.run_folder import squad_summary
from tests.trainer.tiny_run import SIDE, TASKS, tiny_config, tiny_model
from trainer.evaluation.predict import predict, read_photo
from trainer.squads.export import save_model, save_squad


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModSquad:
    return tiny_model(tiny_config(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def exported(model: ModSquad, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    save_model(path, model, tiny_config(path.parent), 7)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "holiday.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(path)
    return path


def test_every_task_gets_a_picture_and_an_array(exported: Path, photo: Path, model: ModSquad, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = predict(exported, [photo], out)
    expected = ["holiday.rgb.png", *(f"holiday.{task}.{kind}" for task in TASKS for kind in ("png", "npy"))]
    assert [path.name for path in written] == expected
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)
    depth = np.load(out / "holiday.depth_zbuffer.npy")
    assert depth.shape == (1, SIDE, SIDE)
    assert depth.dtype == np.float32
    assert np.load(out / "holiday.class_scene.npy").shape == (365,)

    seen = torch.from_numpy(np.array(Image.open(out / "holiday.rgb.png"))).permute(2, 0, 1)[None]
    with torch.no_grad():
        output = model(seen.float() / 127.5 - 1, torch.tensor([0]), torch.tensor([TASKS.index("depth_zbuffer")]))
    np.testing.assert_allclose(depth, output.predictions["depth_zbuffer"][0], atol=1e-5)


def test_only_the_named_tasks_are_predicted(exported: Path, photo: Path, tmp_path: Path) -> None:
    written = predict(exported, [photo], tmp_path / "out", tasks=["normal"])
    assert [path.name for path in written] == ["holiday.rgb.png", "holiday.normal.png", "holiday.normal.npy"]


@pytest.mark.parametrize("tasks", [["normal"], ["class_scene", "normal"]], ids="+".join)
def test_a_squad_with_all_experts_predicts_what_the_whole_model_does(
    tasks: list[str], model: ModSquad, exported: Path, photo: Path, tmp_path: Path
) -> None:
    kept = {layer.name: list(range(layer.num_experts)) for layer in model.expert_layers}
    save_squad(tmp_path / "squad", extract_squad(model, tasks, kept), squad_summary())
    predict(tmp_path / "squad", [photo], tmp_path / "small")
    predict(exported, [photo], tmp_path / "whole", tasks)
    names = [path.name for path in (tmp_path / "whole").iterdir()]
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == sorted(names)
    for task in tasks:
        small, whole = (np.load(tmp_path / name / f"holiday.{task}.npy") for name in ("small", "whole"))
        np.testing.assert_allclose(small, whole, atol=1e-5)


def test_one_task_of_a_squad_of_several_can_be_asked_for(model: ModSquad, photo: Path, tmp_path: Path) -> None:
    kept = {layer.name: [0, 1] for layer in model.expert_layers}
    save_squad(tmp_path / "squad", extract_squad(model, ["class_scene", "normal"], kept), squad_summary())
    written = predict(tmp_path / "squad", [photo], tmp_path / "out", ["normal"])
    assert [path.name for path in written] == ["holiday.rgb.png", "holiday.normal.png", "holiday.normal.npy"]


def test_an_unknown_task_is_named_with_the_known_ones(exported: Path, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not predict 'edges'; its tasks: class_scene, depth_zbuffer, normal"):
        predict(exported, [photo], tmp_path, tasks=["edges"])


def test_a_path_without_a_model_is_refused(photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at"):
        predict(tmp_path / "nothing", [photo], tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        predict(tmp_path, [photo], tmp_path)
    with pytest.raises(UserError, match="no safetensors file"):
        predict(photo, [photo], tmp_path)


def test_two_photos_of_one_name_are_refused_before_any_is_predicted(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would write the same files"):
        predict(exported, [tmp_path / "a" / "x.jpg", tmp_path / "b" / "x.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_read_are_named(photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jpg: no such image"):
        read_photo(tmp_path / "absent.jpg", SIDE)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png: not an image"):
        read_photo(tmp_path / "text.png", SIDE)
    (tmp_path / "cut.jpg").write_bytes(photo.read_bytes()[:600])
    with pytest.raises(UserError, match=r"cut\.jpg: cannot read the image"):
        read_photo(tmp_path / "cut.jpg", SIDE)
    with pytest.raises(UserError, match="cannot read the image"):
        read_photo(tmp_path, SIDE)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(7, 5), (16, 16), (300, 20)])
def test_photos_of_any_kind_and_size_fit(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    grey = Image.new("I;16", size, 32768) if mode == "I;16" else Image.new("L", size, 128).convert(mode)
    grey.save(path)
    pixels = read_photo(path, SIDE)
    assert pixels.shape == (SIDE, SIDE, 3)
    assert pixels.dtype == np.uint8
    if mode != "1":
        assert abs(int(pixels.mean()) - 128) <= 3


def test_a_photo_keeps_its_proportions_and_loses_its_sides(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 255  # the central square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert read_photo(tmp_path / "wide.png", SIDE)[:, 1:-1].min() > 240


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    top_white = np.zeros((32, 32, 3), dtype=np.uint8)
    top_white[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(top_white).save(tmp_path / "phone.png", exif=exif)
    pixels = read_photo(tmp_path / "phone.png", SIDE)
    assert pixels[:6].max() < 10
    assert pixels[-6:].min() > 245
