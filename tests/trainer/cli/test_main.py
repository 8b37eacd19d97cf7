"""The `modsquad` command as a user starts it: help, one-line errors with status 2, tracebacks on request."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from configs.load import load_config
from tests.trainer.tiny_run import write_shards

COMMANDS = (
    [],
    ["quickstart"],
    ["data"],
    ["data", "rooms"],
    ["data", "pack"],
    ["data", "pack", "taskonomy"],
    ["data", "pack", "pascal-context"],
    ["data", "index"],
    ["data", "check"],
    ["data", "show"],
    ["train"],
    ["evaluate"],
    ["conflict"],
    ["extract"],
    ["predict"],
    ["export"],
    ["report"],
    ["compare"],
    ["bench"],
)


def modsquad(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=200)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words) or "modsquad")
def test_every_command_explains_itself_without_loading_torch(command: list[str]) -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from trainer.cli.main import app;"
        f"result = CliRunner().invoke(app, {[*command, '--help']!r}); print(result.output);"
        "assert 'torch' not in sys.modules; sys.exit(result.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_version_is_that_of_the_installed_distribution() -> None:
    assert modsquad("--version").stdout.strip() == version("modsquad")


def test_print_shows_the_resolved_configuration_that_loads_back(tmp_path: Path) -> None:
    done = modsquad("train", "quickstart", "optim.lr=0.5", "--print")
    assert done.returncode == 0, done.stderr
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(done.stdout)
    assert load_config(resolved) == load_config("quickstart", ["optim.lr=0.5"])


def check_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()
    assert len(last) == 1, done.stderr
    assert last[0].startswith("error: ")
    for part in parts:
        assert part in last[0]


def test_unknown_key() -> None:
    check_one_line(modsquad("train", "quickstart", "optim.lrr=1"), "unknown key 'optim.lrr'", "'optim.lr'")


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    check_one_line(modsquad("data", "check", tmp_path / "shards"), str(tmp_path / "shards"))


def test_folder_without_any_label(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    check_one_line(modsquad("data", "pack", "taskonomy", tmp_path / "raw", tmp_path / "out"), str(tmp_path / "raw"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "shards"
    write_shards(folder, 4)
    return folder


def train(shards: Path, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return modsquad(
        "train", "quickstart", f"run_dir={run_dir}", f"data.train={shards}", f"data.val={shards}", "data.image_size=16",
        "tasks=[normal, depth_zbuffer]", "train.steps=20", *overrides,
    )  # fmt: skip


def test_world_that_ep_size_does_not_divide(shards: Path, tmp_path: Path) -> None:
    check_one_line(train(shards, tmp_path / "run"), "ep_size 2 does not divide the world of 1 rank")


def test_missing_and_truncated_shards(shards: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in shards.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    tar = next(copied.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-2048])
    check_one_line(train(copied, tmp_path / "run", "parallel.ep_size=1"), tar.name)
    tar.unlink()
    check_one_line(train(copied, tmp_path / "run", "parallel.ep_size=1"), tar.name)


def test_debug_shows_the_traceback_of_a_mistake(shards: Path, tmp_path: Path) -> None:
    training = ("train", "quickstart", f"run_dir={tmp_path}/run", f"data.train={shards}", f"data.val={tmp_path}")
    for command in (("data", "check", str(tmp_path)), (*training, "parallel.ep_size=1")):
        done = modsquad("--debug", *command)
        assert done.returncode == 1
        assert "Traceback" in done.stderr
