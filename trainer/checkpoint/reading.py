"""Checkpoints that survive any crash and resume on any layout: how they are found, checked and read.

A checkpoint is the engine's logical state (whole tensors, free of world size, `ep_size`, ZeRO stage and dtype) in
torch.distributed.checkpoint's format, every rank writing a share, and the training loop's own state; see
`trainer.checkpoint.saving` for how they are written. What is wrong on one rank is agreed between all.
"""

import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from configs.atomic import write_text_atomically
from configs.errors import UserError
from trainer.checkpoint.files import (
    Manifest,
    find_damage,
    naming_read_errors,
    naming_storage_errors,
    naming_tensor_errors,
    read_manifest,
    read_state,
)
from trainer.distributed.agreement import on_all, on_each, on_main
from trainer.engine import Engine

CHECKPOINTS, LATEST = "checkpoints", "latest"


@dataclass(frozen=True)
class Restored:
    """What `load_latest` found.

    Attributes:
        step: optimizer steps done.
        state: what was given to `save`; tuples have become lists.
        damaged: for each newer checkpoint that was passed over, what is wrong with it; to be shown.
    """

    step: int
    state: dict[str, Any]
    damaged: tuple[str, ...] = ()


def load_latest(run_dir: Path, engine: Engine) -> Restored | None:
    """Restore the checkpoint that `latest` names, or the newest intact one before it. A collective call.

    Every file is checked against its SHA-256 first. Where a newer one is passed over, `latest` moves back.

    Returns:
        None when the run has no checkpoint.

    Raises:
        UserError: every checkpoint is damaged, or the newest intact one holds another model, or a file cannot be read,
            which leaves `latest` where it is; the same on all ranks.
        RuntimeError: torch failed at reading the tensors for another reason; likewise.
    """
    group = engine.world_group
    candidates = on_main(group, lambda: _candidates(run_dir))
    damaged: list[str] = []
    for folder in candidates:
        found = on_all(group, partial(check_share, folder, dist.get_rank(group), engine.layout.world))
        if problem := next(filter(None, found), None):
            damaged.append(problem)
            continue
        step, stored, state = on_each(group, partial(_read_beside_tensors, folder))
        _restore(folder, engine, stored)
        if damaged:  # from here on newer ones are no part of the run
            on_main(group, partial(write_text_atomically, folder.parent / LATEST, f"{folder.name}\n"))
        return Restored(step, state, tuple(damaged))
    if damaged:
        raise UserError(
            f"no checkpoint in {run_dir / CHECKPOINTS} is intact ({damaged[0]}): put a good copy back, or remove that "
            "folder to start from step 0"
        )
    return None


def read_weights(run_dir: Path) -> tuple[int, dict[str, Tensor]]:
    """Return (step, fp32 weights by parameter name, all experts) of the newest intact checkpoint, without an engine.

    Damaged ones that are passed over are named on standard error.

    Raises:
        UserError: the run has no intact checkpoint, or a file cannot be read.
        RuntimeError: torch failed at reading the tensors for another reason.
    """
    damaged = []
    for folder in _candidates(run_dir):
        if problem := check_share(folder, 0, 1):
            damaged.append(problem)
            print(f"passed over a damaged checkpoint: {problem}", file=sys.stderr)
            continue
        with naming_read_errors(folder):
            weights = _read_masters(folder)
        manifest = read_manifest(folder)
        assert isinstance(manifest, Manifest), "it was read a moment ago"
        return manifest.step, weights
    raise UserError(f"{run_dir} has no intact checkpoint{f' ({damaged[0]})' if damaged else ''}: train it first")


@naming_storage_errors()
def _candidates(run_dir: Path) -> list[Path]:
    """Return the checkpoint that `latest` names and those before it, newest first; all where it names none of them."""
    folder = run_dir / CHECKPOINTS
    complete, latest = complete_folders(folder), read_pointer(folder)
    return [path for path in complete if path.name <= latest] or complete


def read_pointer(folder: Path) -> str:
    """Return the name that `latest` holds, "" for none."""
    pointer = folder / LATEST
    return pointer.read_text().strip() if pointer.exists() else ""


def complete_folders(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, damaged ones included, newest first."""
    return sorted(folder.glob("step_" + "[0-9]" * 8), reverse=True)


def check_share(folder: Path, share: int, shares: int) -> str | None:
    """Check the manifest, and one of `shares` shares of the files; return what is wrong.

    Raises:
        UserError: a file is there and cannot be read, which is no damage.
    """
    manifest = read_manifest(folder)
    return manifest if isinstance(manifest, str) else find_damage(folder, manifest, share, shares)


def _read_masters(folder: Path) -> dict[str, Tensor]:
    sizes = {name: size for name, size in _stored_sizes(folder).items() if name.startswith("master.")}
    tensors: dict[str, Any] = {name: torch.empty(size) for name, size in sizes.items()}
    with warnings.catch_warnings(), naming_tensor_errors():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is, on purpose
        load_tensors(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return {name.removeprefix("master."): value for name, value in tensors.items()}


def _read_beside_tensors(folder: Path) -> tuple[int, dict[str, torch.Size], dict[str, Any]]:
    """Return the step, the sizes of the stored tensors, and the loop's state."""
    manifest = read_manifest(folder)
    assert isinstance(manifest, Manifest), "it was read a moment ago"
    with naming_read_errors(folder):
        return manifest.step, _stored_sizes(folder), read_state(folder)


def _restore(folder: Path, engine: Engine, stored: dict[str, torch.Size]) -> None:
    logical = engine.logical_state()
    sizes = {name: tensor.shape for name, tensor in logical.items()}
    if different := [name for name in sorted(sizes.keys() | stored.keys()) if sizes.get(name) != stored.get(name)]:
        name = different[0]
        raise UserError(
            f"{folder} holds another model: {name} is {_shape(stored.get(name))} there and {_shape(sizes.get(name))} "
            "in this configuration; resume with the configuration of that run, or choose another run_dir"
        )
    with naming_read_errors(folder), naming_tensor_errors():
        load_tensors(logical, storage_reader=FileSystemReader(folder), process_group=engine.world_group)
    engine.load_logical_state(logical)


def _stored_sizes(folder: Path) -> dict[str, torch.Size]:
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def _shape(size: torch.Size | None) -> str:
    return "absent" if size is None else str(tuple(size))
