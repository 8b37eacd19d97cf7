"""`modsquad predict`: photos in, one picture and one array per photo and task out.

A photo is turned upright by its EXIF tag, scaled so that its shorter side is the model's side, and cropped in the
centre: proportions stay, as they are in the training images. What the model saw is written beside its predictions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from configs.atomic import atomic_path
from configs.errors import UserError
from configs.tasks import TaskSpec
from data_pipeline.pictures import to_picture
from data_pipeline.targets import prepare_images
from model.mod_squad import ModSquad
from trainer.squads.export import SQUAD_FILE, load_exported, load_run_model, load_squad


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A model from a file, ready for images.

    Attributes:
        tasks: what it predicts.
        image_size: side S of its square input in pixels.
        run: images (1, 3, S, S) float32 in [-1, 1] and task names -> raw head outputs, (C, S, S) or (C,) float32.
    """

    tasks: tuple[TaskSpec, ...]
    image_size: int
    run: Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]


def predict(model_path: Path, images: Sequence[Path], out: Path, tasks: Sequence[str] | None = None) -> list[Path]:
    """Predict tasks on photos and return the files written, in order.

    Per photo STEM: `STEM.rgb.png` (what the model saw), and per task `STEM.TASK.png` (a picture) and `STEM.TASK.npy`
    (the raw head output, (C, S, S) or (C,) float32, in the task's target space).

    Args:
        model_path: a squad folder, an exported safetensors file, or a run folder.
        images: photos of any size and any format that Pillow reads.
        out: folder that receives the files.
        tasks: names of tasks of the model; None: all.

    Raises:
        UserError: no model there, a task that it does not predict, an image that cannot be read, two images of the
            same name, or `out` cannot be written.
    """
    _check_names(images)
    predictor = open_predictor(model_path)
    specs = _chosen_tasks(predictor, tasks, model_path)
    written = []
    for path in images:
        pixels = read_photo(path, predictor.image_size)
        batch = prepare_images(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        with torch.inference_mode():
            predictions = predictor.run(batch, [spec.name for spec in specs])
        written.append(_write_picture(out / f"{path.stem}.rgb.png", pixels))
        for spec in specs:
            prediction = predictions[spec.name]
            name = f"{path.stem}.{spec.name}"
            written.append(_write_picture(out / f"{name}.png", to_picture(spec, prediction, None)))
            written.append(_write_array(out / f"{name}.npy", prediction.numpy()))
    return written


def open_predictor(path: Path) -> Predictor:
    """Return the model at `path`: a squad folder, an exported safetensors file, or a run folder; on the CPU.

    Raises:
        UserError: there is none of the three.
    """
    if (path / SQUAD_FILE).is_file():
        squad = load_squad(path)
        return Predictor(
            tasks=squad.tasks,
            image_size=squad.image_size,
            run=lambda images, _: {name: prediction[0] for name, prediction in squad(images).items()},
        )
    if path.is_file():
        model, _, _ = load_exported(path)
    elif path.is_dir():
        model, _, _ = load_run_model(path)
    else:
        raise UserError(f"no model at {path}: give a squad folder, an exported .safetensors file or a run folder")
    return Predictor(tasks=model.tasks, image_size=model.image_size, run=lambda *a: _run_whole(model, *a))


def read_photo(path: Path, side: int) -> NDArray[np.uint8]:
    """Return a photo as (side, side, 3) uint8: upright, scaled by its shorter side, cropped in the centre.

    Raises:
        UserError: no such file, no image, a damaged one, or one that would not fit in memory.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey; Pillow would clip it to white
                upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
            fitted = ImageOps.fit(upright.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image of a format that Pillow reads") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot read the image ({error})") from None
    return np.asarray(fitted).copy()


def _run_whole(model: ModSquad, images: Tensor, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Run the pairs of one image with the named tasks only."""
    chosen = [task for task, spec in enumerate(model.tasks) if spec.name in names]
    pair_task = torch.tensor(chosen)
    predictions = model(images, torch.zeros_like(pair_task), pair_task).predictions
    return {name: predictions[name][0] for name in names}


def _check_names(images: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in images:
        if path.stem in seen:
            raise UserError(f"{seen[path.stem]} and {path} would write the same files: predict them into two folders")
        seen[path.stem] = path


def _chosen_tasks(predictor: Predictor, names: Sequence[str] | None, where: Path) -> list[TaskSpec]:
    known = {spec.name: spec for spec in predictor.tasks}
    if names is None:
        return list(predictor.tasks)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{where} does not predict '{unknown[0]}'; its tasks: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _write_picture(path: Path, picture: NDArray[np.uint8]) -> Path:
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
    return path


def _write_array(path: Path, array: NDArray[np.float32]) -> Path:
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)
    return path
