"""Memory of this process's GPU, or on a CPU of its machine and of itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class _GroupFiles:
    """Files of a control group: its limit ("max": none), what it uses; its count of page cache in `memory.stat`."""

    limit: str
    used: str
    reclaimable: str


_VERSION_1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _GroupFiles("memory.max", "memory.current", "inactive_file")


def available_bytes(root: Path = Path("/")) -> int:
    """Return what is free on this rank's GPU, or on its machine: of the system, and of its control groups.

    Files that the kernel keeps in memory and can let go of at any time count as free.

    Args:
        root: of the file system that says so on a CPU.
    """
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free
    free = _kibibytes(root / "proc/meminfo", "MemAvailable") * 1024
    return max(0, min([free, *_free_in_groups(root)]))


def peak_bytes() -> int:
    """Return the most that torch has reserved on the GPU, or that this process has held in RAM.

    Not `getrusage`: its maximum begins at what the process held that started this one.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return _kibibytes(Path("/proc/self/status"), "VmHWM") * 1024


def _free_in_groups(root: Path) -> Iterator[int]:
    """Yield what each control group around this process still allows: those of its container, its job and others."""
    membership = root / "proc/self/cgroup"
    if not membership.is_file():
        return
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            yield from _free_up_to(root / "sys/fs/cgroup", group, _VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _free_up_to(root / "sys/fs/cgroup/memory", group, _VERSION_1)


def _free_up_to(top: Path, group: str, files: _GroupFiles) -> Iterator[int]:
    # A container may see its own group at the top only, but be told the name that the group has outside.
    lowest = top / group.lstrip("/")
    for folder in (lowest, *lowest.parents):
        if (folder / files.limit).is_file() and (limit := _text(folder / files.limit)) != "max":
            counts = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
            yield int(limit) - int(_text(folder / files.used)) + int(counts[files.reclaimable])
        if folder == top:
            return


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


def _kibibytes(path: Path, name: str) -> int:
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return int(lines[name].split()[0])
