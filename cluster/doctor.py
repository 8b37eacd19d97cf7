"""Checks before a run: is this machine, or this cluster, fit to train? Every finding says what to do.

Checks of one machine are here; those that take several ranks (`cluster.doctor_ranks`) run as processes of this machine
or as a SLURM job.
"""

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from cluster.cpu import usable_cores

Verdict = Literal["good", "warning", "bad"]

_OURS = ("configs", "model", "data_pipeline", "cluster", "trainer")
_LIBRARIES = ("torch", "deepspeed", "fairscale", "webdataset", "submitit", "prometheus-client")
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        verdict: bad: training will fail; warning: it may, or be slow.
        found: what is there.
        advice: what to do; empty where all is good.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


def check_machine(run_folder: Path) -> Iterator[Finding]:
    """Yield what is found on this machine.

    Args:
        run_folder: where runs will be written.
    """
    yield _python()
    yield from map(_package_is_ours, _OURS)
    yield from map(_library, _LIBRARIES)
    yield _accelerators()
    yield Finding("cores", "good", f"{usable_cores()} that this process may use")
    yield _space("space for runs", run_folder, 20 * _GIB, "checkpoints take a few GiB each: choose another run_dir")
    yield _space("space for temporary files", Path(os.environ.get("TMPDIR", "/tmp")), _GIB, "set TMPDIR elsewhere")
    yield _shared_memory()
    yield _host_name()
    yield _open_files()


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", "good", f"{found}, {sys.executable}")


def _package_is_ours(name: str) -> Finding:
    """The folders of this program are top-level packages, so another distribution may take their names."""
    home = Path(__file__).parents[1].resolve()
    spec = importlib.util.find_spec(name)
    places = [Path(place).resolve() for place in (spec.submodule_search_locations or ())] if spec else []
    if places != [home / name]:
        where = ", ".join(map(str, places)) or (spec.origin if spec and spec.origin else "nowhere")
        return Finding(
            f"package {name}",
            "bad",
            f"imported from {where}",
            f"another distribution or folder shadows it: install modsquad into an environment of its own, and look for "
            f"a folder or file '{name}' where you start from and on PYTHONPATH",
        )
    return Finding(f"package {name}", "good", str(places[0]))


def _library(name: str) -> Finding:
    try:
        return Finding(name, "good", version(name))
    except PackageNotFoundError:
        return Finding(name, "bad", "not installed", f"pip install {name}")


def _accelerators() -> Finding:
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            return Finding(
                "GPU",
                "bad",
                f"nvidia-smi is here, but torch {torch.__version__} sees no GPU",
                "install a CUDA build of torch, or check the driver and CUDA_VISIBLE_DEVICES",
            )
        return Finding("GPU", "warning", "none: gloo on CPUs", "enough to try things out; train on GPUs")
    names = sorted({torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())})
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    found = f"{torch.cuda.device_count()} x {', '.join(names)}, CUDA {torch.version.cuda}, NCCL {nccl}"
    if not torch.cuda.is_bf16_supported():
        return Finding("GPU", "warning", f"{found}, no bfloat16", "train with train.dtype=fp32")
    return Finding("GPU", "good", found)


def _space(check: str, folder: Path, wanted: int, advice: str) -> Finding:
    there = folder.resolve()
    while not there.is_dir():
        there = there.parent
    free = shutil.disk_usage(there).free
    found = f"{free / _GIB:.1f} GiB free at {there}"
    if not os.access(there, os.W_OK):
        return Finding(check, "bad", f"{there} cannot be written", advice)
    return Finding(check, "good", found) if free >= wanted else Finding(check, "warning", found, advice)


def _shared_memory() -> Finding:
    """Loader processes hand over batches through it; containers often have 64 MiB."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "warning", "no /dev/shm", "train with data.workers=0")
    free = shutil.disk_usage(folder).free
    found = f"{free / _GIB:.2f} GiB free in /dev/shm"
    if free < _GIB:
        return Finding("shared memory", "warning", found, "docker run --shm-size 8g, or data.workers=0")
    return Finding("shared memory", "good", found)


def _host_name() -> Finding:
    """Ranks of other machines, and gloo on this one, look the name up."""
    name = socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)})
    except OSError as error:
        return Finding(
            "host name",
            "warning",
            f"'{name}' does not resolve ({error})",
            f"add it to /etc/hosts, or set GLOO_SOCKET_IFNAME; with several nodes others must resolve '{name}' too",
        )
    return Finding("host name", "good", f"{name} is {', '.join(addresses)}")


def _open_files() -> Finding:
    import resource  # noqa: PLC0415  # not on every system

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return Finding("open files", "warning", f"at most {soft}", "ulimit -n 4096")
    return Finding("open files", "good", f"at most {soft}")
