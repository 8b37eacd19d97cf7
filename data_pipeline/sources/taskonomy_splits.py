"""The official splits of Taskonomy: which buildings are for training, validation and test.

Four nested splits exist, each a file `train_val_test_<split>.csv` with the columns id, train, val and test; its lines
end with a carriage return alone. The files do not come with the data.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from configs.errors import UserError

SplitName = Literal["tiny", "medium", "full", "fullplus"]
PartName = Literal["train", "val", "test"]

PARTS: tuple[PartName, ...] = get_args(PartName)
SOURCE = "https://github.com/StanfordVL/taskonomy/raw/master/data/assets/splits_taskonomy.zip"
"""Where the files are published."""

# Buildings per part: counted in the published files, and as the table of the dataset's README has them.
_IN_FILES: dict[SplitName, tuple[int, int, int]] = {
    "tiny": (25, 5, 5),
    "medium": (99, 20, 19),
    "full": (346, 67, 69),
    "fullplus": (383, 75, 79),
}
_IN_README: dict[SplitName, tuple[int, int, int]] = {
    "tiny": (25, 5, 5),
    "medium": (98, 20, 20),
    "full": (344, 67, 71),
    "fullplus": (381, 75, 81),
}
_FOLDERS = ("", "splits_taskonomy")


@dataclass(frozen=True)
class Split:
    """One part of a split, and what the split's other parts are.

    Attributes:
        name: which split.
        part: which of its parts is meant.
        parts: part -> its buildings, in the order of the file.
    """

    name: SplitName
    part: PartName
    parts: Mapping[PartName, tuple[str, ...]]

    @property
    def buildings(self) -> tuple[str, ...]:
        """The part's buildings."""
        return self.parts[self.part]

    def missing(self, found: Set[str]) -> tuple[str, ...]:
        """Return the part's buildings that are not among `found`."""
        return tuple(building for building in self.buildings if building not in found)

    def facts(self, found: Set[str]) -> tuple[str, ...]:
        """Return lines that say how many buildings of each part the file lists, the dataset has, and are `found`."""
        lines = [f"official split {self.name}, part {self.part}"]
        for part, in_file, in_readme in zip(PARTS, _IN_FILES[self.name], _IN_README[self.name], strict=True):
            listed = self.parts[part]
            here = sum(building in found for building in listed)
            published = f"published: {in_file}" + (f", {in_readme} by its README" if in_readme != in_file else "")
            lines.append(f"{part}: {len(listed)} buildings listed ({published}), {here} of them in the source folder")
        return tuple(lines)


def find_split_file(root: Path, name: SplitName) -> Path:
    """Return the file of a split that lies in a dataset's folder.

    Raises:
        UserError: there is none; says where it is published.
    """
    file = f"train_val_test_{name}.csv"
    for folder in _FOLDERS:
        if (root / folder / file).is_file():
            return root / folder / file
    raise UserError(f"{root} has no {file}: unpack {SOURCE} there, or give the file with --split-csv")


def read_split(path: Path, name: SplitName, part: PartName) -> Split:
    """Read a split's file.

    Raises:
        UserError: it cannot be read, its columns are not id, train, val and test, a line does not put one building into
            one part, a building comes twice, or the part has no building.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"split file {path} cannot be read ({error}): get it from {SOURCE}") from None
    header, *lines = text.splitlines() or [""]
    if header != ",".join(("id", *PARTS)):
        raise UserError(f"split file {path} starts with '{header[:40]}', not 'id,train,val,test': get it from {SOURCE}")
    parts: dict[PartName, list[str]] = {known: [] for known in PARTS}
    seen: set[str] = set()
    for number, line in enumerate(lines, start=2):
        building, *flags = line.split(",")
        if not building or sorted(flags) != ["0", "0", "1"] or building in seen:
            raise UserError(
                f"split file {path}, line {number}, is '{line[:40]}', but must put a new building into one part: "
                f"get it from {SOURCE}"
            )
        seen.add(building)
        parts[PARTS[flags.index("1")]].append(building)
    if not parts[part]:
        raise UserError(f"split file {path} puts no building into '{part}': get it from {SOURCE}")
    return Split(name, part, {known: tuple(buildings) for known, buildings in parts.items()})
