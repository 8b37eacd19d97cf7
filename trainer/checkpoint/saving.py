"""Checkpoints are written so that a crash at any moment leaves the one before, in the background where asked.

A checkpoint goes into a hidden folder beside its place, is made durable, described in a manifest, and renamed; then
`latest` names it, and only then older ones go, once enough intact ones are known to stay. Whatever goes wrong on one
rank is agreed between all, so that none waits for another.
"""

import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from configs.atomic import atomic_path, sync_folder
from configs.errors import UserError
from configs.schema import CheckpointConfig
from trainer.checkpoint.files import (
    MANIFEST,
    FileEntry,
    Manifest,
    checkpoint_name,
    checkpoint_step,
    describe_file,
    encode_state,
    naming_storage_errors,
    naming_tensor_errors,
    storage_error,
    write_durably,
)
from trainer.checkpoint.reading import CHECKPOINTS, LATEST, check_share, complete_folders, read_pointer
from trainer.distributed.agreement import on_all, on_main
from trainer.engine import Engine
from trainer.master_state import LogicalState

_PARTIAL = ".partial"
# Named by torch's RuntimeErrors about a file that it could not write, which do not carry the system's reason.
_ARCHIVE_WRITERS = ("PytorchStreamWriter", "inline_container")


class CheckpointSaver:
    """Saves one checkpoint at a time; with `async_save` in a thread of its own, while training goes on.

    What is saved is copied before `save` returns, so that the next step may change it. All methods but `close` are
    collective calls.
    """

    def __init__(
        self, run_dir: Path, engine: Engine, config: CheckpointConfig, on_saved: Callable[[], None] = lambda: None
    ) -> None:
        """Save states of `engine` to `run_dir`; `on_saved` hears of each complete one, in the caller's thread."""
        self._run_dir, self._engine, self._config, self._on_saved = run_dir, engine, config, on_saved
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Wait for the save before, then start that of `step`; without `async_save`, finish it.

        Raises:
            UserError: this save or the one before could not be written; the same on all ranks.
            RuntimeError: torch failed at either for another reason, such as memory; the same on all ranks.
        """
        self.wait()
        copied = _copy(self._run_dir, self._engine, step, state)
        write = partial(_write, copied, self._config.keep_last, self._config.keep_every)
        if not self._config.async_save:
            write()
            self._on_saved()
            return
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what a save in the background has met, once all ranks know; one number on the CPU while there is one.

        Raises:
            UserError, RuntimeError: see `save`.
        """
        if self._thread is None:
            return
        ended = torch.tensor(int(not self._thread.is_alive()))
        dist.all_reduce(ended, dist.ReduceOp.MIN, group=self._engine.world_group)
        if ended:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that was begun is complete.

        Raises:
            UserError, RuntimeError: see `save`.
        """
        if self._thread is None:
            return
        self.close()
        error, self._error = self._error, None
        if error is not None:
            raise error
        self._on_saved()

    def close(self) -> None:
        """Wait for the end of a save, whether it succeeds or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, write: partial[Path]) -> None:
        try:
            write()
        except BaseException as error:  # whatever it is, a save that failed must not count as done
            self._error = error


def save(
    run_dir: Path, engine: Engine, *, step: int, state: Mapping[str, Any], keep_last: int, keep_every: int | None = None
) -> Path:
    """Save after `step` optimizer steps and return the checkpoint's folder. A collective call.

    Args:
        run_dir: folder of the run, shared by all ranks.
        engine: between two steps.
        step: replaces a checkpoint of the same step.
        state: JSON values and tensors; rank 0's is saved, so it must hold for all ranks.
        keep_last: intact checkpoints to keep, this one included. Older ones go, and those that a run which fell back to
            an earlier one has abandoned. Those that may stay are read again first, each rank a share of the files;
            one that cannot be read at the moment stays beside them.
        keep_every: checkpoints of steps that this divides are kept as well.

    Raises:
        UserError: no space, or the folder cannot be written; the same on all ranks. Earlier checkpoints are intact.
        RuntimeError: torch failed for another reason, such as memory; likewise.
    """
    return _write(_copy(run_dir, engine, step, state), keep_last, keep_every)


@dataclass(frozen=True)
class _Copy:
    """What a checkpoint will hold, apart from the training that goes on.

    Attributes:
        folder: of the run's checkpoints.
        group: all ranks; not in use elsewhere until the save has ended.
        manifest: without the files.
        tensors: this rank's part of the logical state.
        state_files: content of the files of the loop's state, by name; of rank 0.
    """

    folder: Path
    group: dist.ProcessGroup
    manifest: Manifest
    tensors: LogicalState
    state_files: dict[str, bytes]


def _copy(run_dir: Path, engine: Engine, step: int, state: Mapping[str, Any]) -> _Copy:
    layout = engine.layout
    return _Copy(
        run_dir / CHECKPOINTS,
        engine.saving_group,
        Manifest(step=step, world=layout.world, ep_size=layout.ep_size, zero_stage=engine.zero_stage, files={}),
        engine.logical_state(),
        encode_state(state) if dist.get_rank(engine.saving_group) == 0 else {},
    )


def _write(copied: _Copy, keep_last: int, keep_every: int | None) -> Path:
    """Write a checkpoint and remove what is no longer kept. A collective call in `copied.group`."""
    folder, group = copied.folder, copied.group
    rank, final = dist.get_rank(group), folder / checkpoint_name(copied.manifest.step)
    unfinished = folder / f".{final.name}{_PARTIAL}"
    try:
        on_main(group, lambda: _begin(folder, unfinished, copied.state_files))
        _save_tensors(copied.tensors, unfinished, group)
        described = on_all(group, lambda: _describe_share(unfinished, rank))
        files = {name: entry for share in described for name, entry in share.items()}
        manifest = copied.manifest.model_copy(update={"files": files})
        before = on_main(group, lambda: _complete(unfinished, final, manifest))
    finally:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
    _prune(folder, group, final, before, keep_last, keep_every)
    return final


def _prune(
    folder: Path, group: dist.ProcessGroup, final: Path, before: str, keep_last: int, keep_every: int | None
) -> None:
    """Remove the checkpoints that are not kept, and what killed saves have left. A collective call.

    Args:
        folder, group: of the checkpoints; all ranks.
        final: the checkpoint just written.
        before: name of the one that `latest` named until then; what is newer than that was abandoned.
        keep_last, keep_every: see `save`.
    """
    names = on_main(group, lambda: [path.name for path in complete_folders(folder)])
    newest = before if before in names else final.name  # it may name one that was removed by hand
    older = [name for name in names if name <= newest and name < final.name]
    kept, intact = {final.name}, 1
    while older and intact < keep_last:
        name = older.pop(0)
        found = on_all(group, partial(_inspect, folder / name, dist.get_rank(group), dist.get_world_size(group)))
        if "damaged" not in found:
            kept.add(name)
            intact += "unreadable" not in found
    if keep_every is not None:
        kept |= {name for name in older if checkpoint_step(name) % keep_every == 0}
    on_main(group, lambda: _remove([folder / name for name in names if name not in kept], folder))


def _inspect(folder: Path, share: int, shares: int) -> Literal["intact", "damaged", "unreadable"]:
    """Say what `check_share` finds; what cannot be read now may be as good as ever."""
    try:
        return "damaged" if check_share(folder, share, shares) else "intact"
    except UserError:
        return "unreadable"


@naming_storage_errors()
def _begin(folder: Path, unfinished: Path, state_files: Mapping[str, bytes]) -> None:
    """Make an empty hidden folder, sweep out those of killed saves, and write the loop's state."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    for stale in folder.glob(f".{LATEST}.*"):  # as `atomic_path` names them
        with suppress(OSError):
            stale.unlink()
    unfinished.mkdir()
    for name, content in state_files.items():
        write_durably(unfinished / name, content)


@naming_storage_errors()
def _save_tensors(logical: LogicalState, unfinished: Path, group: dist.ProcessGroup) -> None:
    """Write every rank's share. Failures are agreed inside; the same error on all ranks."""
    # Nothing is copied ahead, as all is in host memory: for that torch would open, in this thread, a context on GPU 0.
    writer = FileSystemWriter(unfinished, per_thread_copy_ahead=0)
    try:
        with naming_tensor_errors():
            save_tensors(logical, storage_writer=writer, process_group=group)
    except RuntimeError as error:
        if any(name in str(error.__cause__) for name in _ARCHIVE_WRITERS):
            raise storage_error("a file could not be written whole") from None
        raise


@naming_storage_errors()
def _describe_share(unfinished: Path, rank: int) -> dict[str, FileEntry]:
    """Describe the files that `rank` wrote: `__RANK_*` its tensors; rank 0 everything else."""
    files = [path for path in unfinished.iterdir() if path.name.startswith(f"__{rank}_")]
    if rank == 0:
        files += [path for path in unfinished.iterdir() if not path.name.startswith("__")]
    return {path.name: describe_file(path) for path in files}


@naming_storage_errors()
def _complete(unfinished: Path, final: Path, manifest: Manifest) -> str:
    """Turn the hidden folder into a checkpoint and name it in `latest`; return what that named before."""
    folder = final.parent
    before = read_pointer(folder)
    if missing := [name for name in manifest.files if not (unfinished / name).exists()]:
        raise storage_error(f"rank 0 does not see {missing[0]}, which another rank has written")
    write_durably(unfinished / MANIFEST, manifest.model_dump_json(indent=1).encode())
    sync_folder(unfinished)
    with atomic_path(folder / LATEST) as pointer:  # written first, in case there is no space left, and moved last
        pointer.write_text(f"{final.name}\n")
        if final.exists():  # the run fell back to an earlier one; this one stays until the new one is in place
            _hide(final)
        unfinished.rename(final)
        sync_folder(folder)
    return before


@naming_storage_errors()
def _remove(doomed: list[Path], folder: Path) -> None:
    """Remove checkpoints, each first out of sight: what is left of one that is half removed must not look damaged.

    What cannot be removed now, as NFS keeps a file that somebody reads, goes with a later save.
    """
    for path in doomed:
        _hide(path)
    _sweep(folder)


def _hide(path: Path) -> None:
    path.rename(path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}"))


def _sweep(folder: Path) -> None:
    for path in folder.glob(f".*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)
