"""What lies where in a shard: its tar's files, grouped into samples.

Readers of tar streams split a sample whose members are apart. This pass is strict: the tar must be whole
(`data_pipeline.tarwalk`), the members of a sample adjacent, every sample with one square image of the shard's size.
"""

import hashlib
import os
from operator import add
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from configs.errors import UserError
from data_pipeline.codecs import image_shape
from data_pipeline.tarwalk import TarError, walk_tar

IMAGE_FIELD = "rgb"
MASK_FIELD = "mask_valid"
META_FIELD = "meta"

# Above any image or label that is decoded; the index counts in 32 bits.
_MOST_MEMBER_BYTES = 2**28


class Members(BaseModel):
    """Where one kind of member lies: a column over the samples of a shard.

    Attributes:
        offset: first byte of each sample's member in the shard; -1 where the sample has none.
        size: its bytes; 0 where the sample has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    offset: tuple[int, ...]
    size: tuple[int, ...]


class ShardEntry(BaseModel):
    """One shard's part of the index. `model_dump_json` and `model_validate_json` carry it through files.

    Attributes:
        file: file name inside the folder of the shards.
        file_bytes: size of the file.
        sha256: checksum of the file, hexadecimal.
        side: height and width of every image, in pixels.
        keys: the samples' keys, in file order.
        members: member name without key, such as `depth_zbuffer.png` -> its places.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    file_bytes: int
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    side: PositiveInt
    keys: tuple[str, ...]
    members: dict[str, Members]

    @model_validator(mode="after")
    def _check_columns(self) -> "ShardEntry":
        for name, members in self.members.items():
            if not len(members.offset) == len(members.size) == len(self.keys):
                raise ValueError(
                    f"{len(members.offset)} offsets and {len(members.size)} sizes of {name} for {len(self.keys)} keys"
                )
            ends = map(add, members.offset, members.size)
            if min(members.size) < 0 or min(members.offset) < -1 or max(ends) > self.file_bytes:
                raise ValueError(f"{name} lies outside the {self.file_bytes} bytes of {self.file}")
        return self

    @field_validator("file")
    @classmethod
    def _check_file(cls, file: str) -> str:
        """A shard is beside its index, whatever that says."""
        if file in ("", ".", "..") or "/" in file or "\0" in file:
            raise ValueError(f"{file!a} is no name of a file in this folder")
        return file

    @field_validator("keys")
    @classmethod
    def _check_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if not keys:
            raise ValueError("a shard has no sample")
        return keys

    @property
    def fields(self) -> frozenset[str]:
        """Member names without their formats: `rgb`, `meta`, names of tasks."""
        return frozenset(name.rpartition(".")[0] for name in self.members)


def scan_shard(path: Path) -> ShardEntry:
    """Index one tar file of samples.

    Members named `<key>.<field>.<suffix>` are indexed; files without a field are left out.

    Raises:
        UserError: the file is cut, is no plain tar or holds links, has no sample, scatters or repeats a sample, or an
            image is missing, is not square, or has another size than the first.
        OSError: it cannot be read.
    """
    if not path.name.isprintable():
        raise UserError(f"shard {str(path)!a}: the name is not UTF-8, or holds control characters: rename it")
    try:
        samples = _group_members(path)
    except TarError as error:
        raise UserError(f"shard {path} {error}: copy or pack it again") from None
    if not samples:
        raise UserError(f"shard {path} holds no sample: members are named <key>.rgb.png, <key>.<task>.png")
    names = sorted({name for sample in samples.values() for name in sample})
    columns = {name: [sample.get(name, (-1, 0)) for sample in samples.values()] for name in names}
    return ShardEntry(
        file=path.name,
        file_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        side=_common_side(path, samples),
        keys=tuple(samples),
        members={
            name: Members(offset=tuple(o for o, _ in places), size=tuple(s for _, s in places))
            for name, places in columns.items()
        },
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _group_members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Return key -> member -> (offset, size), in the order of the tar."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    current = None
    for file in walk_tar(path):
        key, field, suffix = _split_member(file.name)
        if not field:
            continue
        if file.size > _MOST_MEMBER_BYTES:
            raise UserError(
                f"shard {path}: {file.name} has {file.size} bytes, more than the {_MOST_MEMBER_BYTES} that are read: "
                "leave it out"
            )
        if key != current and key in samples:
            raise UserError(f"shard {path}: the members of sample {key} are not next to each other: pack it again")
        current = key
        sample = samples.setdefault(key, {})
        if any(other.rpartition(".")[0] == field for other in sample):
            raise UserError(f"shard {path}: sample {key} holds '{field}' twice: keep one of them")
        sample[f"{field}.{suffix}"] = (file.offset, file.size)
    return samples


def _split_member(name: str) -> tuple[str, str, str]:
    """Split `dir/key.field.suffix` into key (with its folder), field and suffix, lower case; no field: ''."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    field, _, suffix = extension.lower().rpartition(".")
    return os.fspath(path.with_name(stem)) if stem else name, field, suffix


def _common_side(path: Path, samples: dict[str, dict[str, tuple[int, int]]]) -> int:
    """Return the one height and width of all images."""
    side = 0
    with path.open("rb") as file:
        for key, members in samples.items():
            name = next((name for name in members if name.rpartition(".")[0] == IMAGE_FIELD), None)
            if name is None:
                raise UserError(f"shard {path}: sample {key} has no image: it needs a member {key}.{IMAGE_FIELD}.png")
            offset, size = members[name]
            file.seek(offset)
            where = f"shard {path}, sample {key}, member {name}"
            height, width = image_shape(name.rpartition(".")[2], file.read(size), where)
            side = side or height
            if (height, width) != (side, side):
                raise UserError(
                    f"{where} is {height} x {width} pixels, but the shard's images must all be {side} x {side}"
                )
    return side
