"""A copy of the program beside the run: a job that waits or is requeued runs the code that it was submitted with."""

import hashlib
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from configs.atomic import cannot_write

PACKAGES = ("configs", "model", "data_pipeline", "cluster", "trainer")


def snapshot_code(folder: Path) -> Path:
    """Copy the packages of this program into `folder`/code-HASH, unless it is there; return that folder.

    To run it, put it first on PYTHONPATH.

    Raises:
        UserError: the copy cannot be written.
    """
    files = [(name, path) for name in PACKAGES for path in _files(_home(name))]
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name}/{path.relative_to(_home(name))}\0".encode())
        digest.update(path.read_bytes())
    target = folder / f"code-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    partial = folder / f".{target.name}.{os.getpid()}.partial"
    try:
        for name, path in files:
            copy = partial / name / path.relative_to(_home(name))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        partial.rename(target)
    except OSError as error:
        if target.is_dir():  # another launch was faster
            return target
        raise cannot_write(target, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _home(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None, "we run from it"
    assert spec.submodule_search_locations, "it is a package"
    return Path(next(iter(spec.submodule_search_locations)))


def _files(home: Path) -> list[Path]:
    return sorted(
        path for path in home.rglob("*") if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    )
