"""Files that this process holds open."""

import os
from contextlib import suppress
from pathlib import Path


def open_descriptors(folder: Path) -> dict[int, str]:
    """Return what of `folder` is open, deleted files too, by descriptor."""
    found = {}
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # The listing's own, and what other threads closed meanwhile.
            found[int(descriptor)] = os.readlink(f"/proc/self/fd/{descriptor}")
    return {descriptor: name for descriptor, name in found.items() if name.startswith(f"{folder}/")}


def open_files(folder: Path) -> list[str]:
    """Return what of `folder` is open, once for each descriptor."""
    return list(open_descriptors(folder).values())
