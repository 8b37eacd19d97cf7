"""Which files of a Taskonomy or omnidata folder belong to which view.

Only names are read, and the headers of tars; a full Taskonomy is 4.6 million views.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from configs.errors import UserError
from data_pipeline.sources.raw_file import RawFile
from data_pipeline.sources.taskonomy_views import CollectedViews, Views, safe_building
from data_pipeline.tarwalk import TarError, TarFile, walk_tar

# Of any format: one that cannot be read becomes a listed problem, not a label that was never there.
_NAME = re.compile(r"point_(\d{1,18})_view_(\d{1,18})_domain_\w+\.\w+")
_ALIASES = {"class_places": "class_scene", "class_1000": "class_object"}


@dataclass(frozen=True)
class Found:
    """What lies under a folder.

    Attributes:
        views: by building, point and view.
        strays: files of the domains whose names tell no view, hidden ones aside.
        buildings: names of all buildings with a file or tar of a domain, wanted or not; without the folders above them.
    """

    views: Views
    strays: list[RawFile]
    buildings: frozenset[str]


def find_views(root: Path, domains: Sequence[str], only: Set[str] | None = None) -> Found:
    """Find the views under `root` that have a file of one of `domains`.

    Args:
        root: folder to search.
        domains: which files to look for.
        only: names of the buildings to look into; None: all.

    Raises:
        UserError: no such folder, one that cannot be read, no file of a known domain, none of the wanted buildings, no
            image at all, a damaged tar, or two buildings whose names become the same key.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give the one that holds rgb, depth_zbuffer and the like")
    collected = CollectedViews(domains)
    strays = []
    found = set()
    buildings = set()
    for building, domain, path in _raw_paths(root, domains):
        buildings.add(_last_part(building))
        if only is not None and _last_part(building) not in only:
            continue
        for name, file in _raw_files(path):
            match = _NAME.fullmatch(name)
            if match is None:
                if not name.startswith("."):
                    strays.append(file)
                continue
            found.add(domain)
            collected.add(building, int(match[1]), int(match[2]), domain, file)
    if only is not None and buildings and not buildings & only:
        raise UserError(
            f"{root} holds none of the {len(only)} buildings wanted ({_some(only)}): it holds {_some(buildings)}"
        )
    if "rgb" not in found:
        here = ", ".join(sorted(path.name for path in root.iterdir())[:10]) or "nothing"
        raise UserError(
            f"{root} holds {'no rgb' if found else 'no known domain'}: looked for files point_P_view_V_domain_D in "
            f"folders or tars named {', '.join(domains)}; it holds {here}"
        )
    views = Views(collected)
    _check_keys(views)
    return Found(views, strays, frozenset(buildings))


def _last_part(building: str) -> str:
    return building.rpartition("/")[2]


def _some(buildings: Iterable[str]) -> str:
    """Name a few buildings; a folder without any has files of a building without a name."""
    names = sorted(name or "files of no named building" for name in buildings)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _check_keys(views: Views) -> None:
    if len(set(map(safe_building, views.buildings))) == len(views.buildings):
        return
    owner: dict[str, str] = {}
    for view in views:
        if (other := owner.setdefault(view.key, view.building)) != view.building:
            raise UserError(
                f"buildings '{other}' and '{view.building}' would share the sample key {view.key}: rename one of them"
            )


def _raw_paths(root: Path, domains: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (building, domain, path of a file or tar) in the order of paths."""
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse_unreadable):
        subfolders.sort()
        folders = Path(folder).relative_to(root).parts
        place = _split_folders(folders, domains)
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith(".tar"):
                # The folders inside repeat the domain, so the tar's own name is all that matters.
                of_tar = _split_folders((*folders, name.removesuffix(".tar")), domains)
                if of_tar is not None:
                    yield *of_tar, path
            elif place is not None:
                yield *place, path


def _raw_files(path: str) -> Iterator[tuple[str, RawFile]]:
    """Yield (file name, file): the file at `path`, or all of a tar, which counts as a folder."""
    if path.endswith(".tar"):
        for file in _tar_files(path):
            yield PurePosixPath(file.name).name, RawFile(path, file.name, file.offset, file.size)
    else:
        yield os.path.basename(path), RawFile(path)


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): mend it, or move it away")


def _tar_files(path: str) -> list[TarFile]:
    try:
        return list(walk_tar(Path(path)))
    except OSError as error:
        raise UserError(f"tar {path} cannot be read ({error.strerror}): download it again") from None
    except TarError as error:
        raise UserError(f"tar {path} {error}: download it again") from None


def _split_folders(folders: tuple[str, ...], domains: Sequence[str]) -> tuple[str, str] | None:
    """Return (building, domain) for the folders above a file; None if none of them names a domain.

    A folder names a domain by being called so, or by ending in `_<domain>`, before which stands the building.
    """
    known = {**{domain: domain for domain in domains}, **_ALIASES}
    for place in reversed(range(len(folders))):
        for alias, domain in known.items():
            if folders[place] == alias or folders[place].endswith(f"_{alias}"):
                named = re.compile(rf"(^|_)({alias}|{domain})$")
                rest = [named.sub("", part) for part in folders]
                return "/".join(part for part in rest if part), domain
    return None
