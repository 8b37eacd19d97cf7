"""The `modsquad` command as a user starts it: help, one-line errors with status 2, tracebacks on request."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.jobs import JobState
from cluster.launch import JobRecord
from configs.load import load_config
from tests.trainer.tiny_run import write_shards
from trainer.cli.main import app

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


@pytest.fixture
def bracketed(tiny_run: Path, tmp_path: Path) -> Path:
    """A run in a folder whose name looks like markup, and whose path is longer than a line."""
    run = tmp_path / "[/x] y" / ("long" * 20)
    shutil.copytree(tiny_run, run)
    return run


def last_line(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()[-1]


def test_paths_are_told_as_they_are(bracketed: Path, tmp_path: Path) -> None:
    photo, squad, weights = bracketed / "photo.png", bracketed / "squad", bracketed / "all.safetensors"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(photo)
    extract = ("extract", bracketed, "--task", "normal", "--routing", "validation")
    assert last_line(*extract, "--out", squad) == f"wrote {squad}"
    assert last_line("predict", squad, photo, "--out", bracketed / "out") == f"wrote 3 files to {bracketed / 'out'}"
    assert last_line("export", bracketed, "--out", weights).startswith(f"wrote {weights} (")
    assert last_line("report", bracketed) == f"wrote {bracketed / 'report' / 'index.html'}"
    provisioning = bracketed / "monitoring" / "grafana" / "provisioning"
    assert last_line("monitor", bracketed) == f"  GF_PATHS_PROVISIONING='{provisioning}' grafana server"


def test_the_status_of_a_run_has_its_name_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "000_tasks=[normal]"
    (run / "slurm").mkdir(parents=True)
    record = JobRecord(job_id="7", folder=str(run / "slurm"), ranks=1, submitted=0.0)
    (run / "slurm" / "job.json").write_text(json.dumps(asdict(record)))
    monkeypatch.setattr("cluster.jobs.job_state", lambda job_id: JobState(state="PENDING", reason="[/held]"))
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app, ["status", str(run)], catch_exceptions=False)
    assert result.output.splitlines()[-2].split()[1:6:2] == ["000_tasks=[normal]", "7", "pending"]
    assert "([/held])" in result.output
