"""Squads as files that need no Modsquad to run: `.onnx`, and `.pt2` for `torch.export.load`.

Both hold one graph: `images` (batch, 3, S, S) float32 in [-1, 1], any batch, to one raw prediction per task, named by
it. Beside it stands what a reader must know (`description`): in ONNX as metadata, in `.pt2` as the file modsquad.json.
A file appears only after it was read back and found to predict what the squad predicts.
"""

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.atomic import atomic_path
from configs.errors import UserError
from model.extract import SquadModel
from model.portable import images_clear_of_ties, trace_squad

SUFFIXES = (".onnx", ".pt2")
TOLERANCE = 1e-4
"""Largest absolute difference allowed between what a file and its squad predict."""

DESCRIPTION_FILE = "modsquad.json"
CANDIDATES, CHECKED = 8, 3  # random images drawn, and those of them that are compared

_Predict = Callable[[Tensor], Mapping[str, Tensor]]


def save_portable(squad: SquadModel, out: Path) -> float:
    """Write a squad in the format of the suffix of `out`, read it back, and return the largest difference found.

    Tracing takes a minute for a model of 12 blocks with all its experts.

    Args:
        squad: in eval mode, on the CPU.
        out: a path that ends in one of SUFFIXES.

    Raises:
        UserError: `.onnx` without the packages for it, or `out` cannot be written.
        RuntimeError: the file predicts something else than the squad; it is not kept.
    """
    assert out.suffix in SUFFIXES
    write = _write_onnx if out.suffix == ".onnx" else _write_pt2
    with atomic_path(out) as temporary:
        predict = write(squad, temporary)
        difference = _largest_difference(squad, predict)
        if not difference <= TOLERANCE:  # NaN too
            raise RuntimeError(f"{out} would differ from the squad by {difference:.1e}, more than {TOLERANCE:.0e}")
    return difference


def description(squad: SquadModel) -> dict[str, str]:
    """Return what a reader of the graph must know, as text: version, image size, and per task its target space (JSON).

    Target spaces are those of `configs.tasks.TaskSpec`: a prediction of class tasks, for one, is a row of logits.
    """
    tasks = {
        task.name: {
            "target": task.target,
            "loss": task.loss,
            "channels": task.channels,
            "scale": task.scale,
            "mean": task.mean,
            "std": task.std,
            "codes_per_metre": task.codes_per_metre,
            "class_names": task.class_names,
        }
        for task in squad.tasks
    }
    return {"modsquad": version("modsquad"), "image_size": str(squad.image_size), "tasks": json.dumps(tasks)}


def _write_onnx(squad: SquadModel, path: Path) -> _Predict:
    onnxruntime, _, _ = map(_require, ("onnxruntime", "onnxscript", "onnx"))
    with _without_remarks():
        program = torch.onnx.export(
            trace_squad(squad),
            output_names=[task.name for task in squad.tasks],
            dynamic_shapes={"images": {0: "batch"}},
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(description(squad))
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def predict(images: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True))

    return predict


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"ONNX files need the package {package}: install the extra 'onnx' (pip install -e '.[onnx]')"
        ) from None


def _stable_sort(x: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    """Translate `Tensor.sort(stable=True)`: among equals, ONNX's TopK puts the lower index first, and so do we."""
    from onnxscript import opset20 as op  # noqa: PLC0415 (an extra)

    assert stable
    assert dim == -1
    return op.TopK(x, op.Shape(x, start=-1), largest=int(descending))


def _write_pt2(squad: SquadModel, path: Path) -> _Predict:
    with _without_remarks():
        torch.export.save(trace_squad(squad), path, extra_files={DESCRIPTION_FILE: json.dumps(description(squad))})
        module: _Predict = torch.export.load(path).module()
    return module


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence what the exporters tell their own developers: deprecations inside torch, packages that no squad needs."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _largest_difference(squad: SquadModel, predict: _Predict) -> float:
    """Return the largest absolute difference over all tasks; NaN where a prediction is."""
    S = squad.image_size
    drawn = torch.rand(CANDIDATES, 3, S, S, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images_clear_of_ties(squad, drawn, CHECKED)
    expected, found = squad(images), predict(images)
    assert list(found) == list(expected)
    return max(float((found[task] - expected[task]).abs().max()) for task in expected)
