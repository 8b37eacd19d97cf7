"""The views of a Taskonomy folder, kept small: a full one has 4.6 million of them, each of up to 15 files."""

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

import numpy as np

from data_pipeline.sources.raw_file import RawFile


@dataclass(slots=True)
class View:
    """One view of a building and its files.

    Attributes:
        building: folders between the domain's and the file, joined with `/`; may be empty.
        point: number of the point of interest.
        view: number of the camera.
        files: domain -> its file.
        repeated: further files of a domain that `files` has already.
    """

    building: str
    point: int
    view: int
    files: dict[str, RawFile] = field(default_factory=dict)
    repeated: list[tuple[str, RawFile]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Key of the sample, `<building>/point_P_view_V`."""
        return _key(self.building, self.point, self.view)


def safe_building(building: str) -> str:
    """Return a building's part of its views' keys: `-` for what a key cannot hold."""
    return re.sub(r"[^A-Za-z0-9_/-]", "-", building)


class _Name(NamedTuple):
    """What the paths of a building's files of one domain share: all but the numbers of point and view.

    Attributes:
        tar: where the file lies; empty for a plain one.
        before: of its path, what comes before the numbers.
        numbered: whether they are written plainly; else all of the path is in `after`.
        after: what comes after them.
    """

    tar: str
    before: str
    numbered: bool
    after: str


class Views(Sequence[View]):
    """Views by building, point and view, each made when it is asked for."""

    def __init__(self, collected: "CollectedViews") -> None:
        rows = sorted(collected.rows.items())
        order = np.fromiter((row for _, row in rows), np.int64, len(rows))
        places = np.argsort(order)
        self.buildings = sorted({building for (building, _, _), _ in rows})
        numbers = {building: number for number, building in enumerate(self.buildings)}
        self._building = np.fromiter((numbers[building] for (building, _, _), _ in rows), np.int32, len(rows))
        self._point = np.fromiter((point for (_, point, _), _ in rows), np.int64, len(rows))
        self._view = np.fromiter((view for (_, _, view), _ in rows), np.int64, len(rows))
        self._files = {domain: np.asarray(files)[order] for domain, files in collected.files.items()}
        self._names = list(collected.names)
        self._members = collected.members
        self._repeated = {int(places[row]): files for row, files in collected.repeated.items()}

    def __len__(self) -> int:
        return len(self._view)

    @overload
    def __getitem__(self, index: int) -> View: ...

    @overload
    def __getitem__(self, index: slice) -> list[View]: ...

    def __getitem__(self, index: int | slice) -> View | list[View]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        point, view = int(self._point[index]), int(self._view[index])
        files = {
            domain: self._file(int(files[index]), point, view) for domain, files in self._files.items() if files[index]
        }
        return View(self.buildings[self._building[index]], point, view, files, self._repeated.get(index, []))

    def summary(self, index: int) -> tuple[str, list[str]]:
        """Return the key of a view and its domains, sorted; the paths, which take longer, are not made."""
        key = _key(self.buildings[self._building[index]], int(self._point[index]), int(self._view[index]))
        return key, sorted(domain for domain, files in self._files.items() if files[index])

    def _file(self, number: int, point: int, view: int) -> RawFile:
        offset, size = 0, -1
        if number < 0:
            number, offset, size = self._members[-3 * number - 3 : -3 * number]
        name = self._names[number - 1]
        path = f"{name.before}{_numbers(point, view) if name.numbered else ''}{name.after}"
        return RawFile(name.tar, path, offset, size) if name.tar else RawFile(path)


class CollectedViews:
    """Files of views as they are found, in any order.

    Attributes:
        rows: building, point and view -> number of the view.
        files: domain -> per view: 0 without a file, n for a file with the nth of `names`, -n for the nth of `members`.
        names: in order, each with its number.
        members: of tars: number of the name, offset and size, one after another.
        repeated: number of a view -> further files of a domain that it has already.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self.rows: dict[tuple[str, int, int], int] = {}
        self.files = {domain: array("i") for domain in domains}
        self.names: dict[_Name, int] = {}
        self.members = array("q")
        self.repeated: dict[int, list[tuple[str, RawFile]]] = {}

    def add(self, building: str, point: int, view: int, domain: str, file: RawFile) -> None:
        """Add a file to a view."""
        row = self.rows.setdefault((building, point, view), len(self.rows))
        if row == len(self.files[domain]):
            for files in self.files.values():
                files.append(0)
        if self.files[domain][row]:
            self.repeated.setdefault(row, []).append((domain, file))
            return
        before, numbers, after = (file.member or file.path).rpartition(_numbers(point, view))
        name = _Name(file.path if file.member else "", before, bool(numbers), after)
        number = self.names.setdefault(name, len(self.names) + 1)
        if file.member:
            self.members.extend((number, file.offset, file.size))
            number = -(len(self.members) // 3)
        self.files[domain][row] = number


def _numbers(point: int, view: int) -> str:
    return f"point_{point}_view_{view}"


def _key(building: str, point: int, view: int) -> str:
    return f"{safe_building(building)}/{_numbers(point, view)}".lstrip("/")
