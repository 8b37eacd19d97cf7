"""What lies in a checkpoint's folder beside the sharded tensors, and how its files are told intact from damaged.

`manifest.json` is written last: it names every other file with its size and SHA-256. `state.json` holds what the
training loop keeps (data position, counters); tensors in it are replaced by {"__tensor__": NAME} and lie in
`state.safetensors`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from configs.errors import UserError

MANIFEST, STATE_JSON, STATE_TENSORS = "manifest.json", "state.json", "state.safetensors"
_TENSOR_KEY = "__tensor__"


class FileEntry(BaseModel):
    """Size and content of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a complete checkpoint holds, and the layout that wrote it (any layout can read it)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    step: int
    world: int
    ep_size: int
    zero_stage: int
    files: dict[str, FileEntry]


def checkpoint_name(step: int) -> str:
    """Name of the folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def checkpoint_step(name: str) -> int:
    """Return the step of a name that `checkpoint_name` made."""
    return int(name.removeprefix("step_"))


@contextmanager
def naming_storage_errors() -> Iterator[None]:
    """Turn the system's errors about a checkpoint's files into user errors."""
    try:
        yield
    except OSError as error:
        raise storage_error(error) from error


@contextmanager
def naming_read_errors(folder: Path) -> Iterator[None]:
    """Turn the system's errors while a checkpoint is read, which prove no damage, into user errors."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read the checkpoint {folder} ({_first_line(error)}): try the same command again; if it stays so, "
            "remove that folder to go on from the checkpoint before it"
        ) from error


@contextmanager
def naming_tensor_errors() -> Iterator[None]:
    """Turn torch's error about the sharded tensors, which no `except Exception` catches, into one that callers handle.

    An OSError if that is the cause, else a RuntimeError with its cause; the same on all ranks, as torch agrees on it.
    """
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, OSError):
            raise cause from None
        raise RuntimeError(str(error)) from cause


def storage_error(cause: object) -> UserError:
    """Return what a user is told when a checkpoint cannot be written, or their folder not be used."""
    return UserError(
        f"cannot use the checkpoint folder ({_first_line(cause)}): free some space or choose another run_dir; "
        "complete checkpoints are as they were"
    )


def _first_line(cause: object) -> str:
    return str(cause).splitlines()[0]


def describe_file(path: Path) -> FileEntry:
    """Make a file durable and return its entry."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest | str:
    """Return the manifest of a checkpoint, or what is wrong with it.

    Raises:
        UserError: it is there and cannot be read.
    """
    path = folder / MANIFEST
    with naming_read_errors(folder):
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            return f"{path}: {error.strerror}"
        except ValidationError:
            return f"{path} is damaged"


def find_damage(folder: Path, manifest: Manifest, share: int, shares: int) -> str | None:
    """Check every `shares`-th file, from the `share`-th on, against the manifest; return the first thing wrong.

    Raises:
        UserError: a file is there and cannot be read.
    """
    with naming_read_errors(folder):
        for name, entry in sorted(manifest.files.items())[share::shares]:
            path = folder / name
            try:
                size = path.stat().st_size
                if size != entry.bytes:
                    return f"{path} has {size} bytes instead of {entry.bytes}"
                if describe_file(path) != entry:
                    return f"{path} has another SHA-256 than when it was written"
            except FileNotFoundError as error:
                return f"{path}: {error.strerror}"
    return None


def encode_state(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files, by name, that hold `state`: JSON values and tensors in lists and dicts with string keys."""
    tensors: dict[str, Tensor] = {}
    tree = _without_tensors(state, tensors)
    return {STATE_JSON: json.dumps(tree, indent=1).encode(), STATE_TENSORS: safetensors.torch.save(tensors)}


def read_state(folder: Path) -> dict[str, Any]:
    """Return what `encode_state` was given; tuples come back as lists."""
    tensors = safetensors.torch.load((folder / STATE_TENSORS).read_bytes())
    state: dict[str, Any] = _with_tensors(json.loads((folder / STATE_JSON).read_bytes()), tensors)
    return state


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"tensor_{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR_KEY: name}
    if isinstance(value, Mapping):
        assert all(isinstance(key, str) for key in value), "JSON would turn other keys into strings"
        return {key: _without_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, tensors) for item in value]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR_KEY}:
            return tensors[value[_TENSOR_KEY]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value
