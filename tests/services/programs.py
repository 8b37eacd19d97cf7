"""Programs that tests run for real: taken from the machine, or from Debian's packages where root can install them."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def need_programs(packages: dict[str, str]) -> None:
    """Make sure that every program (name -> Debian package) is there; skip the test where it cannot be."""
    if not _missing(packages):
        return
    # Test processes side by side would wait for apt's own lock with an error.
    with (Path(tempfile.gettempdir()) / "modsquad-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (missing := _missing(packages)) and os.geteuid() == 0 and shutil.which("apt-get"):
            wanted = sorted({packages[program] for program in missing})
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            for command in (["update"], ["install", "--yes", "--no-install-recommends", *wanted]):
                subprocess.run(["apt-get", "-qq", *command], env=environment, check=False, capture_output=True)
    if missing := _missing(packages):
        pytest.skip(f"not installed, and not installable here: {', '.join(missing)}")


def _missing(packages: dict[str, str]) -> list[str]:
    # Daemons lie outside of an ordinary user's path.
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [program for program in packages if shutil.which(program, path=places) is None]
