"""What the figures of a benchmark depend on: processor, threads, versions."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cluster.cpu import usable_cores

PEERS = ("deepspeed", "transformers")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
_ENVIRONMENT = ("OMP_", "MKL_", "KMP_", "ONEDNN_", "MALLOC_")


def describe_machine() -> dict[str, Any]:
    """Return JSON-able facts about this machine and this process."""
    lines = _cpu_lines()
    return {
        "cpu": lines.get("model name", platform.processor() or platform.machine()),
        "family_model_stepping": [lines.get(key, "unknown") for key in ("cpu family", "model", "stepping")],
        "flags": [flag for flag in _FLAGS if flag in lines.get("flags", "").split()],
        "cores": usable_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": {name: installed_version(name) for name in PEERS},
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_ENVIRONMENT)},
    }


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_lines() -> dict[str, str]:
    """Return the first processor of Linux's /proc/cpuinfo; empty on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
