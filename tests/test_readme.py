"""Every command of the README runs, in the order in which it stands there; trainings end after fewer steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FEWER_STEPS = ("train.steps=20", "train.steps=3 optim.warmup_steps=1")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.timeout(900)
def test_commands_run_in_order(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    commands = [line for block in blocks("sh") for line in block.splitlines() if not line.startswith(". ")]
    assert len(commands) > 8
    assert any(FEWER_STEPS[0] in command for command in commands)
    for command in commands:
        done = subprocess.run(
            shlex.split(command.replace(*FEWER_STEPS)),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, check=True, timeout=100)
    assert (tmp_path / "runs" / "two" / "report" / "index.html").is_file()


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_folders_exist() -> None:
    folders = re.findall(r"^\| `(\w+)/` \|", README, flags=re.MULTILINE)
    assert {"configs", "model", "data_pipeline", "cluster", "trainer"} <= set(folders)
    for path in folders:
        assert (ROOT / path).is_dir(), path


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"^    make (\w+)", README, flags=re.MULTILINE)) <= set(targets)
