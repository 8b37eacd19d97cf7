"""Memory of this process's GPU, or on a CPU of its machine and of itself."""

from pathlib import Path

import torch


def available_bytes() -> int:
    """Return what is free on this rank's GPU, or on its machine: of the system, and of its control group."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free
    free = _kibibytes(Path("/proc/meminfo"), "MemAvailable") * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and (allowed := limit.read_text(encoding="ascii").strip()) != "max":
        free = min(free, int(allowed) - int(used.read_text(encoding="ascii")))
    return free


def peak_bytes() -> int:
    """Return the most that torch has reserved on the GPU, or that this process has held in RAM.

    Not `getrusage`: its maximum begins at what the process held that started this one.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return _kibibytes(Path("/proc/self/status"), "VmHWM") * 1024


def _kibibytes(path: Path, name: str) -> int:
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return int(lines[name].split()[0])
