"""The start of a new run from a file of weights (`train.init_from`): a Mod-Squad, or a dense vision transformer.

A Mod-Squad is what `modsquad export` wrote. Dense weights: safetensors, or what `torch.save` wrote of a state dict,
alone or in a dict under "model", "state_dict" or "model_ema" (as DeiT, MAE and timm publish them). Nothing but tensors
is unpickled. See `docs/initial_weights.md`.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import UserError
from configs.schema import RunConfig
from configs.task_definitions import contradiction
from model.dense_weights import read_dense_vit, start_from_dense
from model.mod_squad import ModSquad
from model.trained_weights import Taken, start_from_trained
from trainer.distributed.agreement import on_each, on_main
from trainer.squads.export import load_exported

_STATE_KEYS = ("model", "state_dict", "model_ema")


def start_from_file(model: ModSquad, config: RunConfig, group: dist.ProcessGroup) -> str | None:
    """Overwrite a new run's weights with those of `train.init_from`, if it is given. A collective call.

    A run that has a checkpoint takes its weights from there: the file is not read, and may be gone.

    Args:
        model: freshly built, on the CPU; holds this rank's shards of experts.
        config: of the run.
        group: all ranks; each reads the file.

    Returns:
        What was read and what of it is not used, for the user; None where nothing was read.

    Raises:
        UserError: no such file, or its weights do not fit the model; the same on all ranks.
    """
    path = config.train.init_from
    if path is None or on_main(group, lambda: any((Path(config.run_dir) / "checkpoints").glob("step_*"))):
        return None

    def start() -> str:
        if _format(Path(path)).startswith("modsquad."):
            trained, _, step = load_exported(Path(path))
            _check_same_tasks(model, trained, path)
            return _describe(start_from_trained(model, trained, path), f"{path} (step {step})")
        dense = read_dense_vit(read_tensors(Path(path)), path)
        start_from_dense(model, dense, seed=config.seed)
        theirs, ours = len(dense.positions), model.backbone.grid
        resampled = f"; positions resampled from {theirs} x {theirs} to {ours} x {ours}" if theirs != ours else ""
        unused = f"; not used: {', '.join(dense.unused)}" if dense.unused else ""
        return f"weights start from {path}{resampled}{unused}"

    return on_each(group, start)


def _check_same_tasks(model: ModSquad, trained: ModSquad, path: str) -> None:
    """Refuse a head whose outputs would mean something else than in the file."""
    theirs = {spec.name: spec for spec in trained.tasks}
    for spec in model.tasks:
        if spec.name in theirs and (key := contradiction(spec, theirs[spec.name])) is not None:
            raise UserError(
                f"{path}: its task '{spec.name}' has another `{key}`, so its head means something else: give the new "
                "task another name"
            )


def _format(path: Path) -> str:
    """Return what a safetensors file says of its format, "" for nothing."""
    if path.suffix != ".safetensors" or not path.is_file():
        return ""
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("format", ""))
    except SafetensorError:
        return ""  # `read_tensors` says what is wrong


def _describe(taken: Taken, source: str) -> str:
    """Return what was taken, as a table: one line for what tasks share, and one per task."""
    theirs, ours = taken.grids
    resampled = f", positions resampled from {theirs} x {theirs} to {ours} x {ours}" if theirs != ours else ""
    told = {
        "shared by all tasks": f"taken{resampled}",
        **dict.fromkeys(taken.taken, "routers, embedding and head taken"),
        **dict.fromkeys(taken.new, "new"),
        **dict.fromkeys(taken.unused, "not used"),
    }
    width = max(map(len, told))
    return "\n".join([f"weights start from {source}", *(f"  {part:{width}}  {what}" for part, what in told.items())])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file (by its suffix) or of a file of `torch.save`, by name.

    Raises:
        UserError: no such file, or it is damaged or holds no state dict.
    """
    if not path.is_file():
        raise UserError(f"train.init_from: {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is no file of torch.save, or holds objects besides tensors, which may run code when read: save "
            "the state dict alone (docs/initial_weights.md)"
        ) from None
    except Exception as error:  # what torch raises on a file that is not its own depends on the bytes it meets
        reason = next(iter(str(error).splitlines()), "it ends too early")
        raise UserError(f"{path} cannot be read, fetch it again: {reason}") from None
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the first mapping that holds tensors: one under a known key, else the content itself."""
    inner = [content[key] for key in _STATE_KEYS if key in content] if isinstance(content, Mapping) else []
    for state in (*inner, content):
        if isinstance(state, Mapping):
            tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors
    raise UserError(f"{path} holds no state dict, neither directly nor under {', '.join(_STATE_KEYS)}")
