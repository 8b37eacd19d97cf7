"""What lies where in a shard: one pass over a tar file's headers.

Readers of tar streams lose samples of a cut file without a word and split a sample whose members are apart. This pass
is strict: the end mark must be there, every member complete, the members of a sample adjacent, every sample with one
square image of the shard's size.
"""

import hashlib
import os
import tarfile
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from configs.errors import UserError
from data_pipeline.codecs import image_shape

IMAGE_FIELD = "rgb"
MASK_FIELD = "mask_valid"
META_FIELD = "meta"

_BLOCK_BYTES = 512
_REPAIR = "copy or pack it again"


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
    sha256: str
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
        return self

    @property
    def fields(self) -> frozenset[str]:
        """Member names without their formats: `rgb`, `meta`, names of tasks."""
        return frozenset(name.rpartition(".")[0] for name in self.members)


def scan_shard(path: Path) -> ShardEntry:
    """Index one tar file of samples.

    Members named `<key>.<field>.<suffix>` are indexed; files without a field are left out.

    Raises:
        UserError: the file is cut, is no plain tar, holds no sample, scatters or repeats a sample, or an image is
            missing, is not square, or has another size than the first.
    """
    _check_end_mark(path)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    current = None
    for name, offset, size in _member_places(path):
        key, field, suffix = _split_member(name)
        if not field:
            continue
        if key != current and key in samples:
            raise UserError(f"shard {path}: the members of sample {key} are not next to each other: pack it again")
        current = key
        sample = samples.setdefault(key, {})
        if any(other.rpartition(".")[0] == field for other in sample):
            raise UserError(f"shard {path}: sample {key} holds '{field}' twice: keep one of them")
        sample[f"{field}.{suffix}"] = (offset, size)
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


def _check_end_mark(path: Path) -> None:
    """A tar ends with two blocks of zeros (POSIX.1-1988, ustar); a cut file does not."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 2 * _BLOCK_BYTES))
        tail = file.read()
    if size % _BLOCK_BYTES or len(tail) < 2 * _BLOCK_BYTES or tail.strip(b"\0"):
        raise UserError(f"shard {path} is truncated or not a plain tar (no end mark): {_REPAIR}")


def _member_places(path: Path) -> list[tuple[str, int, int]]:
    """Return (name, offset, size) of every file in the tar."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            places = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
            end = tar.offset
    except tarfile.TarError as error:
        raise UserError(f"shard {path} is damaged ({error}): {_REPAIR}") from None
    # Behind the last header that tarfile could read there may only be zeros: it takes a damaged header for the end.
    with path.open("rb") as file:
        file.seek(end)
        rest_is_zero = all(not block.strip(b"\0") for block in iter(lambda: file.read(1 << 20), b""))
    if end > size or not rest_is_zero:
        raise UserError(f"shard {path} is damaged behind byte {min(end, size)}: {_REPAIR}")
    return places


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
