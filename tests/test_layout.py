"""The shape of the project: imports point one way, few files know the big libraries, modules stay readable."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "configs": set(),
    "model": {"configs"},
    "data_pipeline": {"configs"},
    "cluster": {"configs"},
    "trainer": {"configs", "model", "data_pipeline", "cluster"},
}
ONLY_IN = {
    "deepspeed": {"trainer/engine.py", "trainer/bench/peers.py"},  # the latter measures DeepSpeed's own layer
    "fairscale": {"trainer/activation_checkpointing.py"},
    "optuna": {"cluster/tune_search.py"},
    "webdataset": {"data_pipeline/shards.py", "trainer/bench/data_shards.py"},  # the latter measures its readers
    "torch.distributed": {"model/dispatch.py", "cluster/doctor_ranks.py", "cluster/places.py", "trainer/"},
}
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80

MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@every_module
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imported(path)} & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[package] | {package}


@every_module
def test_big_libraries_stay_behind_their_seam(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    for library, places in ONLY_IN.items():
        if any(name == library or name.startswith(f"{library}.") for name in imported(path)):
            assert any(place == allowed or (allowed.endswith("/") and place.startswith(allowed)) for allowed in places)


@every_module
def test_modules_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_every_folder_of_code_is_installed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {".".join(path.relative_to(ROOT).parent.parts) for path in MODULES}
