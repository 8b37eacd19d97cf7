"""The files of a tar and where they lie, from one strict walk over its headers; nothing is ever extracted.

Readers that take a damaged header for the end of a tar lose what follows without a word. Here every header must carry
its checksum, every file must lie inside the tar, and two blocks of zeros must end it. What a header declares is checked
before it is believed. Formats: ustar and pax (POSIX.1-2001), long names of GNU.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from unicodedata import category

from configs.errors import UserError

BLOCK_BYTES = 512

_FILES = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
# Long names and pax records; a name of more bytes than any file system takes is none.
_MOST_EXTENSION_BYTES = 2**16
# How files of gzip, bzip2, xz and Zstandard begin.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_KINDS = {
    tarfile.LNKTYPE: "a hard link (write the tar with --hard-dereference)",
    tarfile.SYMTYPE: "a symbolic link (write the tar with --dereference)",
    tarfile.GNUTYPE_SPARSE: "a sparse file (write the tar without --sparse)",
}
# Control characters, what bytes that are not UTF-8 become, and separators of lines.
_UNWRITABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})
_ENCODING = "utf-8"


class TarError(UserError):
    """A tar that is not read; the message goes on from the tar's name, and says nothing of what to do."""


@dataclass(frozen=True, slots=True)
class TarFile:
    """A file in a tar.

    Attributes:
        name: its path there: relative, without `..` or control characters.
        offset: first byte of its content in the tar; its header is the block before.
        size: bytes of its content.
    """

    name: str
    offset: int
    size: int


def walk_tar(path: Path) -> Iterator[TarFile]:
    """Yield the files of a tar in order; folders are left out.

    Raises:
        TarError: the tar is cut, damaged or compressed; it holds links, sparse files, devices or anything else that is
            neither file nor folder; or a name is not UTF-8, absolute, or holds `..` or control characters.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise TarError("is no file")  # Opening a named pipe would wait for ever.
    with path.open("rb", buffering=0) as file:
        walk = _Walk(file.fileno(), os.fstat(file.fileno()).st_size)
        yield from walk.files()


def is_header_of(block: bytes, name: str, size: int) -> bool:
    """Whether the block before a file's content may be its header: the last part of its name, and its size.

    Cheap, for every read. Names that writers may have abbreviated (100 bytes and more, or not ASCII) count as equal, as
    do letters of either case.
    """
    field = block[124:136]
    digits = field.strip(b" \0")
    declared = int.from_bytes(field[1:], "big") if field[:1] == b"\x80" else _octal(digits)
    last = name.rpartition("/")[2].lower()
    written = block[:100].rstrip(b"\0")
    same_name = not last.isascii() or len(written) == 100 or written.lower().endswith(last.encode())
    return len(block) == BLOCK_BYTES and declared == size and same_name


class _Walk:
    """One pass over the tar behind a descriptor of `size` bytes."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size
        self._place = 0

    def files(self) -> Iterator[TarFile]:
        self._check_end()
        extended: dict[str, str] = {}
        while (header := self._header()) is not None:
            kind, size = header.type, header.size
            if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                name = _decode(self._extension(size).rstrip(b"\0"))
                extended |= {"path": name} if kind == tarfile.GNUTYPE_LONGNAME else {}
                continue
            if kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
                records = _pax_records(self._extension(size))
                if kind == tarfile.XGLTYPE and records.keys() & {"path", "size"}:
                    raise TarError("gives all its files one name or size")
                extended |= records if kind != tarfile.XGLTYPE else {}
                continue
            name = _checked_name(extended.get("path", header.name))
            if any(key.startswith("GNU.sparse") for key in extended):
                raise TarError(f"holds '{name}' as {_KINDS[tarfile.GNUTYPE_SPARSE]}")
            if kind in _FILES:
                place = self._place
                size = _integer(extended["size"]) if "size" in extended else size
                self._skip(size)
                yield TarFile(name, place, size)
            elif kind != tarfile.DIRTYPE:
                raise TarError(f"holds '{name}' as {_KINDS.get(kind, f'something of type {kind!a}')}, not as a file")
            extended = {}
        if extended:
            raise TarError(f"is damaged: at byte {self._place} a file is missing behind its long name")

    def _check_end(self) -> None:
        """A tar ends with two blocks of zeros (POSIX.1-1988, ustar); a cut file does not."""
        tail = os.pread(self._descriptor, 2 * BLOCK_BYTES, max(0, self._size - 2 * BLOCK_BYTES))
        if self._size % BLOCK_BYTES == 0 and tail == bytes(2 * BLOCK_BYTES):
            return
        if os.pread(self._descriptor, 6, 0).startswith(_COMPRESSED):
            raise TarError("is compressed, so that no file in it can be read alone (unpack it to a plain tar)")
        raise TarError("is truncated or not a plain tar (no end mark)")

    def _header(self) -> tarfile.TarInfo | None:
        """Return the header at this place and go behind it; None at the end, behind which there are only zeros."""
        block = os.pread(self._descriptor, BLOCK_BYTES, self._place)
        if not block.strip(b"\0"):
            self._check_zeros()
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, _ENCODING, "surrogateescape")
        except (tarfile.TarError, ValueError) as error:
            raise TarError(f"is damaged at byte {self._place} ({error})") from None
        self._place += BLOCK_BYTES
        return header

    def _check_zeros(self) -> None:
        place = self._place
        while block := os.pread(self._descriptor, 1 << 20, place):
            if block.strip(b"\0"):
                raise TarError(f"is damaged behind byte {self._place}: something follows its end mark")
            place += len(block)

    def _skip(self, size: int) -> None:
        """Go behind a content of `size` bytes, which must lie before the end mark."""
        after = self._place + size + -size % BLOCK_BYTES
        if size < 0 or after > self._size - 2 * BLOCK_BYTES:
            raise TarError(f"is damaged at byte {self._place - BLOCK_BYTES}: it declares a file of {size} bytes there")
        self._place = after

    def _extension(self, size: int) -> bytes:
        """Return the content of a header that only tells of the next one."""
        if size > _MOST_EXTENSION_BYTES:
            raise TarError(f"is damaged at byte {self._place - BLOCK_BYTES}: it declares a name of {size} bytes there")
        place = self._place
        self._skip(size)
        data = os.pread(self._descriptor, size, place)
        return data


def _octal(digits: bytes) -> int:
    try:
        return int(digits, 8)
    except ValueError:
        return -1


def _pax_records(data: bytes) -> dict[str, str]:
    """Return the records `<length> <key>=<value>\\n` of a pax header; each length counts its whole record."""
    records = {}
    while data:
        length, space, _ = data.partition(b" ")
        end = _integer(length.decode("ascii", "replace"))
        key, equals, value = data[len(length) + 1 : end].partition(b"=")
        if not space or not equals or not value.endswith(b"\n") or end > len(data):
            raise TarError("is damaged: a pax record is cut off")
        records[_decode(key)] = _decode(value[:-1])
        data = data[end:]
    return records


def _integer(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise TarError("is damaged: a pax record declares no number")
    return int(text)


def _decode(data: bytes) -> str:
    return data.decode(_ENCODING, "surrogateescape")


def _checked_name(name: str) -> str:
    """Refuse names that could lead out of a folder, break a line, or not be written down."""
    plain = name.isprintable() or not any(category(letter) in _UNWRITABLE for letter in name)
    if not name.strip("/") or not plain:
        raise TarError(f"holds a file whose name, {name[:80]!a}, is empty, not UTF-8, or holds control characters")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise TarError(f"holds '{name}', a path that leads out of a folder")
    return name
