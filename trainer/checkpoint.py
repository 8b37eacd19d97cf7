"""Checkpoints that survive any crash and resume on any layout.

A checkpoint is the engine's logical state (whole tensors, free of world size, `ep_size`, ZeRO stage and dtype) in
torch.distributed.checkpoint's format, every rank writing a share, and the training loop's own state. It is written
into a hidden folder beside its place, made durable, described in a manifest, and renamed; then `latest` names it, and
only then older ones go. Whatever goes wrong on one rank is agreed between all, so that none waits for another.
"""

import errno
import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from configs.atomic import atomic_path, cannot_write, sync_folder
from configs.errors import UserError
from trainer.agreement import on_all, on_main
from trainer.checkpoint_files import (
    MANIFEST,
    FileEntry,
    Manifest,
    checkpoint_name,
    describe_file,
    find_damage,
    read_manifest,
    read_state,
    write_durably,
    write_state,
)
from trainer.engine import Engine

_FOLDER, _LATEST, _PARTIAL = "checkpoints", "latest", ".partial"
# Named by torch's RuntimeErrors about a file that it could not write, which do not carry the system's reason.
_ARCHIVE_WRITERS = ("PytorchStreamWriter", "inline_container")


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


def save(run_dir: Path, engine: Engine, *, step: int, state: Mapping[str, Any], keep_last: int) -> Path:
    """Save after `step` optimizer steps and return the checkpoint's folder. A collective call.

    Args:
        run_dir: folder of the run, shared by all ranks.
        engine: between two steps.
        step: replaces a checkpoint of the same step.
        state: JSON values and tensors; rank 0's is saved, so it must hold for all ranks.
        keep_last: complete checkpoints to keep; older ones go, and those of later steps, which a run that fell back
            to an earlier one has abandoned.

    Raises:
        UserError: no space, or the folder cannot be written; the same on all ranks. Earlier checkpoints are intact.
    """
    folder, group = run_dir / _FOLDER, engine.world_group
    rank, final = dist.get_rank(group), folder / checkpoint_name(step)
    unfinished = folder / f".{final.name}{_PARTIAL}"
    logical = engine.logical_state()
    try:
        on_main(group, lambda: _begin(folder, unfinished, state))
        _save_tensors(logical, unfinished, group)
        described = on_all(group, lambda: _describe_share(unfinished, rank))
        manifest = Manifest(
            step=step,
            world=engine.layout.world,
            ep_size=engine.layout.ep_size,
            zero_stage=engine.zero_stage,
            files={name: entry for share in described for name, entry in share.items()},
        )
        on_main(group, lambda: _complete(unfinished, final, manifest, keep_last))
    finally:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
    return final


def load_latest(run_dir: Path, engine: Engine) -> Restored | None:
    """Restore the checkpoint that `latest` names, or the newest intact one before it. A collective call.

    Every file is checked against its SHA-256 first.

    Returns:
        None when the run has no checkpoint.

    Raises:
        UserError: every checkpoint is damaged, or it holds another model; the same on all ranks.
    """
    group = engine.world_group
    candidates = on_main(group, lambda: _candidates(run_dir))
    damaged: list[str] = []
    for folder in candidates:
        found = on_all(group, partial(_check, folder, dist.get_rank(group), engine.layout.world))
        if problem := next(filter(None, found), None):
            damaged.append(problem)
            continue
        manifest = read_manifest(folder)
        assert isinstance(manifest, Manifest), "it was read a moment ago"
        _restore(folder, engine)
        return Restored(manifest.step, read_state(folder), tuple(damaged))
    if damaged:
        raise UserError(
            f"no checkpoint in {run_dir / _FOLDER} is intact ({damaged[0]}): put a good copy back, or remove that "
            "folder to start from step 0"
        )
    return None


def read_weights(run_dir: Path) -> tuple[int, dict[str, Tensor]]:
    """Return (step, fp32 weights by parameter name, all experts) of the newest intact checkpoint, without an engine.

    Raises:
        UserError: the run has no intact checkpoint.
    """
    damaged = []
    for folder in _candidates(run_dir):
        if problem := _check(folder, 0, 1):
            damaged.append(problem)
            continue
        sizes = {name: size for name, size in _stored_sizes(folder).items() if name.startswith("master.")}
        tensors: dict[str, Any] = {name: torch.empty(size) for name, size in sizes.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is, on purpose
            load_tensors(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
        manifest = read_manifest(folder)
        assert isinstance(manifest, Manifest), "it was read a moment ago"
        return manifest.step, {name.removeprefix("master."): value for name, value in tensors.items()}
    raise UserError(f"{run_dir} has no intact checkpoint{f' ({damaged[0]})' if damaged else ''}: train it first")


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in `run_dir`, until the block ends or this process does.

    On a file system without locks, as Lustre may be mounted, nothing keeps them out.

    Raises:
        UserError: another process does so now, or the folder cannot be written.
    """
    path = run_dir / ".lock"
    with ExitStack() as resources:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = resources.enter_context(path.open("ab+", buffering=0))
            _take_lock(file, run_dir)
            file.truncate(0)
            file.write(f"{os.getpid()} on {os.uname().nodename}".encode())
        except OSError as error:
            raise cannot_write(path, error) from error
        yield


def _take_lock(file: FileIO, run_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{run_dir} is in use by another run (process {file.read().decode() or 'unknown'}): "
            "stop that one, or choose another run_dir"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


@contextmanager
def _naming_storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _storage_error(error) from error


def _storage_error(cause: object) -> UserError:
    return UserError(
        f"cannot use the checkpoint folder ({str(cause).splitlines()[0]}): free some space or choose another run_dir; "
        "complete checkpoints are as they were"
    )


@_naming_storage_errors()
def _begin(folder: Path, unfinished: Path, state: Mapping[str, Any]) -> None:
    """Make an empty hidden folder, sweep out those of killed saves, and write the loop's state."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f".*{_PARTIAL}"):
        shutil.rmtree(stale)
    for stale in folder.glob(f".{_LATEST}.*"):  # as `atomic_path` names them
        stale.unlink()
    unfinished.mkdir()
    write_state(unfinished, state)


def _save_tensors(logical: dict[str, Tensor], unfinished: Path, group: dist.ProcessGroup) -> None:
    """Write every rank's share. Failures are agreed inside; the same UserError on all ranks."""
    try:
        save_tensors(logical, storage_writer=FileSystemWriter(unfinished), process_group=group)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, OSError):
            raise _storage_error(cause) from None
        if any(writer in str(cause) for writer in _ARCHIVE_WRITERS):
            raise _storage_error("a file could not be written whole") from None
        raise


@_naming_storage_errors()
def _describe_share(unfinished: Path, rank: int) -> dict[str, FileEntry]:
    """Describe the files that `rank` wrote: `__RANK_*` its tensors; rank 0 everything else."""
    files = [path for path in unfinished.iterdir() if path.name.startswith(f"__{rank}_")]
    if rank == 0:
        files += [path for path in unfinished.iterdir() if not path.name.startswith("__")]
    return {path.name: describe_file(path) for path in files}


@_naming_storage_errors()
def _complete(unfinished: Path, final: Path, manifest: Manifest, keep_last: int) -> None:
    """Turn the hidden folder into a checkpoint, name it in `latest`, and remove what is no longer kept."""
    folder = final.parent
    write_durably(unfinished / MANIFEST, manifest.model_dump_json(indent=1).encode())
    sync_folder(unfinished)
    with atomic_path(folder / _LATEST) as pointer:  # written first, in case there is no space left, and moved last
        pointer.write_text(f"{final.name}\n")
        if final.exists():  # the run fell back to an earlier one; this one stays until the new one is in place
            final.rename(folder / f".{final.name}.replaced{_PARTIAL}")
        unfinished.rename(final)
        sync_folder(folder)
    up_to_now = [path for path in _complete_folders(folder) if path.name <= final.name]
    for path in (set(_complete_folders(folder)) - set(up_to_now[:keep_last])) | set(folder.glob(f".*{_PARTIAL}")):
        shutil.rmtree(path)


@_naming_storage_errors()
def _candidates(run_dir: Path) -> list[Path]:
    """Return the checkpoint that `latest` names and those before it, newest first; all where it names none of them."""
    folder = run_dir / _FOLDER
    complete, pointer = _complete_folders(folder), folder / _LATEST
    latest = pointer.read_text().strip() if pointer.exists() else ""
    return [path for path in complete if path.name <= latest] or complete


def _complete_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_" + "[0-9]" * 8), reverse=True)


def _check(folder: Path, share: int, shares: int) -> str | None:
    """Check this rank's share of the files; return what is wrong."""
    manifest = read_manifest(folder)
    return manifest if isinstance(manifest, str) else find_damage(folder, manifest, share, shares)


def _restore(folder: Path, engine: Engine) -> None:
    logical = engine.logical_state()
    sizes, stored = {name: tensor.shape for name, tensor in logical.items()}, _stored_sizes(folder)
    if different := [name for name in sorted(sizes.keys() | stored.keys()) if sizes.get(name) != stored.get(name)]:
        name = different[0]
        raise UserError(
            f"{folder} holds another model: {name} is {_shape(stored.get(name))} there and {_shape(sizes.get(name))} "
            "in this configuration; resume with the configuration of that run, or choose another run_dir"
        )
    load_tensors(logical, storage_reader=FileSystemReader(folder), process_group=engine.world_group)
    engine.load_logical_state(logical)


def _stored_sizes(folder: Path) -> dict[str, torch.Size]:
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def _shape(size: torch.Size | None) -> str:
    return "absent" if size is None else str(tuple(size))
