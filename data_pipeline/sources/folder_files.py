"""Which files and cells belong to which sample of a described folder or table; no image is opened.

Without a table, samples are the files that fit the pattern of images, and a label that has no file is absent. With one,
samples are its lines, and an empty cell is an absent label.
"""

import csv
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from configs.errors import UserError
from data_pipeline.source import Problem
from data_pipeline.sources.folder_spec import MASK, FolderSpec, unknown_field
from data_pipeline.sources.folder_vectors import VectorLabel
from data_pipeline.sources.path_patterns import Pattern, leaves_root, match_best
from data_pipeline.sources.raw_file import RawFile

IMAGE = "rgb"
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_DIGEST_CHARACTERS = 10


@dataclass(slots=True)
class Row:
    """One sample.

    Attributes:
        name: from its fields; unique.
        relative: path of the image as the root or table has it.
        fields: their values.
        files: `IMAGE`, tasks and the mask -> file, where there is one, though perhaps in name only.
        problems: what is known to be wrong before any file is opened.
    """

    name: str
    relative: str
    fields: dict[str, str]
    files: dict[str, RawFile]
    problems: list[Problem] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Key of the sample: see `safe_key`."""
        return safe_key(self.name)

    @property
    def image(self) -> str:
        """Path of the image, for messages; empty without one."""
        return printable(self.files[IMAGE].path) if IMAGE in self.files else ""


@dataclass(frozen=True)
class Found:
    """What a description leads to.

    Attributes:
        rows: the samples, by name without a table, else in the table's order.
        problems: files of labels without an image, and lines of the table that are no samples.
    """

    rows: list[Row]
    problems: list[Problem]


def find_rows(spec: FolderSpec, root: Path, table: Path | None) -> Found:
    """Find the samples.

    Args:
        spec: the description.
        root: folder below which the files lie.
        table: the CSV file; None: the files' names are all there is.

    Raises:
        UserError: a folder or table that cannot be read, a pattern that fits nothing, a field that does not exist, or
            no sample at all.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: set `root` to the one that holds the images")
    return _rows_of_folder(spec, root) if table is None else _rows_of_table(spec, root, table)


def safe_key(name: str) -> str:
    """Return a key for a sample's name: the name, if it holds only what a key may.

    Else other characters become `-`, and a digest of the name is added, so that names that differ keep keys that do.
    """
    parts = [_UNSAFE.sub("-", part) for part in name.split("/") if part]
    key = "/".join(parts)
    if key == name:
        return key
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:_DIGEST_CHARACTERS]
    return f"{key}-{digest}" if key else digest


def printable(text: str) -> str:
    """Return a path or name as text that any file can hold: bytes that are no UTF-8 become escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _rows_of_folder(spec: FolderSpec, root: Path) -> Found:
    patterns = {place: Pattern(text) for place, text in spec.patterns().items()}
    of_images = patterns[IMAGE]
    _check_fields(spec, patterns, list(of_images.fields))
    found = _match_files(root, list(dict.fromkeys(patterns.values())))
    for place, pattern in patterns.items():
        if not found[pattern]:
            raise UserError(f"{place}: no file below {root} fits '{pattern.text}': {_listing(root, pattern.folder)}")
    rows = []
    used: dict[Pattern, set[tuple[str, ...]]] = {pattern: set() for pattern in found}
    for values, paths in sorted(found[of_images].items()):
        fields = dict(zip(of_images.fields, values, strict=True))
        row = Row(_name(spec, fields, "/".join(values)), paths[0], fields, {IMAGE: _raw(root, paths[0])})
        used[of_images].add(values)
        row.problems += _repeated(row, IMAGE, root, paths)
        for place, pattern in patterns.items():
            identity = tuple(fields[name] for name in pattern.fields)
            if place != IMAGE and (paths := found[pattern].get(identity, [])):
                used[pattern].add(identity)
                row.files[_kind(place)] = _raw(root, paths[0])
                row.problems += _repeated(row, _kind(place), root, paths)
        rows.append(row)
    strays = []
    for pattern, files in found.items():
        kind = next(_kind(place) for place, other in patterns.items() if other == pattern)
        for values in sorted(files.keys() - used[pattern]):
            path = files[values][0]
            strays.append(
                Problem(printable("/".join(values)), kind, "belongs to no image", printable(str(root / path)))
            )
    return _unique(Found(rows, strays), "image")


def _rows_of_table(spec: FolderSpec, root: Path, table: Path) -> Found:
    patterns = {place: Pattern(text) for place, text in spec.patterns().items()}
    delimiter = spec.delimiter or ("\t" if table.suffix.lower() == ".tsv" else ",")
    lines = _read_table(table, delimiter)
    header = next(lines, (1, []))[1]
    if twice := [name for name in header if header.count(name) > 1]:
        raise UserError(f"table {table}: column '{twice[0]}' is there twice: rename one")
    _check_fields(spec, patterns, header)
    rows, problems = [], []
    for number, cells in lines:
        place = f"{table}, line {number}"
        if len(cells) != len(header):
            problems.append(
                Problem(place, "", f"the line has {len(cells)} cells, the header {len(header)}", str(table))
            )
            continue
        fields = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        paths = {_kind(key): pattern.fill(fields) for key, pattern in patterns.items() if _filled(pattern, fields)}
        if IMAGE not in paths:
            problems.append(Problem(place, "", "the line names no image", str(table)))
            continue
        image = PurePosixPath(paths[IMAGE])
        stem = str(image.with_suffix("")) if image.name else paths[IMAGE]
        row = Row(_name(spec, fields, stem), paths[IMAGE], fields, {})
        for kind, path in paths.items():
            if reason := leaves_root(path):
                row.problems.append(Problem(row.key, "" if kind == IMAGE else kind, f"the path {reason}", path))
            else:
                row.files[kind] = _raw(root, path)
        rows.append(row)
    return _unique(Found(rows, problems), "line")


def _check_fields(spec: FolderSpec, patterns: Mapping[str, Pattern], known: list[str]) -> None:
    wanted = [(place, name) for place, pattern in patterns.items() for name in pattern.fields]
    wanted += [("name", name) for name in (Pattern(spec.name).fields if spec.name is not None else ())]
    for task, label in spec.labels.items():
        if isinstance(label, VectorLabel) and label.path is None:
            if not (fields := label.fields(known)):
                raise UserError(f"labels.{task}.values: no field fits {', '.join(label.values)}: {', '.join(known)}")
            wanted += [(f"labels.{task}.{'values' if label.values else 'value'}", name) for name in fields]
    if spec.split is not None:
        wanted += [("split.field", name) for name in (() if spec.split.field is None else (spec.split.field,))]
        wanted += [("split.by", name) for name in spec.split.by]
    for place, name in wanted:
        if name not in known:
            raise UserError(f"{place}: {unknown_field(name, known)}")


def _match_files(root: Path, patterns: list[Pattern]) -> dict[Pattern, dict[tuple[str, ...], list[str]]]:
    """Pattern -> values of its fields -> paths below the root, sorted."""
    found: dict[Pattern, dict[tuple[str, ...], list[str]]] = {pattern: {} for pattern in patterns}
    for path in sorted(_files_below(root, [pattern.folder for pattern in patterns])):
        if best := match_best(patterns, path):
            pattern, values = best
            found[pattern].setdefault(values, []).append(path)
    return found


def _files_below(root: Path, folders: Iterable[str]) -> Iterator[str]:
    """Yield the paths, below the root, of all files in some folders below it, each once; hidden ones aside."""
    walked: list[PurePosixPath] = []
    for folder in sorted(map(PurePosixPath, set(folders))):
        if any(folder.is_relative_to(other) for other in walked):
            continue
        walked.append(folder)
        for where, subfolders, names in os.walk(root / folder, followlinks=True, onerror=_refuse_unreadable):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            below = PurePosixPath(where).relative_to(root)
            yield from (str(below / name) for name in names if not name.startswith("."))


def _refuse_unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): mend it, or move it away")


def _listing(root: Path, folder: str) -> str:
    where = root / folder
    if not where.is_dir():
        return f"there is no folder {where}"
    here = ", ".join(sorted(printable(path.name) for path in where.iterdir())[:8]) or "nothing"
    return f"{where} holds {here}"


def _read_table(table: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells), the header first; empty lines are left out. Any kind of line end will do."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"table {table} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"table {table} is not UTF-8 text: save it as UTF-8") from None
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"table {table}, line {reader.line_num}: {error}") from None


def _filled(pattern: Pattern, fields: Mapping[str, str]) -> bool:
    return all(fields[name] for name in pattern.fields)


def _name(spec: FolderSpec, fields: Mapping[str, str], default: str) -> str:
    return default if spec.name is None else Pattern(spec.name).fill(fields)


def _kind(place: str) -> str:
    """rgb, mask_valid or the task, for the place of a pattern in the description."""
    parts = place.split(".")
    return parts[1] if parts[0] == "labels" else MASK if parts[0] == MASK else IMAGE


def _raw(root: Path, path: str) -> RawFile:
    return RawFile(str(root / path))


def _repeated(row: Row, kind: str, root: Path, paths: list[str]) -> list[Problem]:
    task = "" if kind == IMAGE else kind
    return [
        Problem(row.key, task, f"given twice; used is {printable(paths[0])}", printable(str(root / extra)))
        for extra in paths[1:]
    ]


def _unique(found: Found, what: str) -> Found:
    """Keep the first of rows with one name, or with names whose keys are one."""
    rows: dict[str, Row] = {}
    again = [row for row in found.rows if rows.setdefault(row.key, row) is not row]
    problems = [Problem(row.key, "", f"an earlier {what} has the same name", row.image) for row in again]
    if not rows:
        first = f": {found.problems[0]}" if found.problems else ""
        raise UserError(f"the table has no line with an image{first}")
    return Found(list(rows.values()), [*found.problems, *problems])
