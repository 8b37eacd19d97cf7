"""The main job, small: from nothing to a report on two processes, killed on the way, and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from trainer.quickstart import run_quickstart

SMALL = (
    "--rooms", "16", "--held-out", "8", "train.steps=30", "optim.warmup_steps=1", "train.log_every_steps=1",
    "checkpoint.every_steps=3", "data.image_size=32", "model.width=32", "model.depth=2", "model.shared_blocks=1",
    "train.images_per_step=4",
)  # fmt: skip


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer.cli", "quickstart", "--out", str(out), *SMALL]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def logged_steps(out: Path) -> list[int]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not any(logged >= step for logged in logged_steps(out)):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


@pytest.mark.timeout(600)
def test_quickstart_survives_a_kill_and_an_interrupt_and_then_says_that_it_is_done(tmp_path: Path) -> None:
    out = tmp_path / "[/x] y"
    killed = start(out)
    wait_for_step(out, 4, killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()

    interrupted = start(out)
    wait_for_step(out, max(logged_steps(out)) + 2, interrupted)
    interrupted.send_signal(signal.SIGTERM)
    output, _ = interrupted.communicate(timeout=200)
    assert interrupted.returncode == 128 + signal.SIGTERM, output

    finished, _ = (last := start(out)).communicate(timeout=300)
    assert last.returncode == 0, finished
    assert logged_steps(out) == list(range(1, 31)), "every step exactly once, whatever happened on the way"
    for name in ("report/index.html", "squads/normal/squad.safetensors", "squads/depth_zbuffer/squad.json"):
        assert (out / name).is_file(), finished
    evaluation = json.loads((out / "evaluation" / "step_00000030_val.json").read_text())
    assert len(evaluation["tasks"]) == 13
    assert evaluation["images"] == 8

    before = (out / "metrics.jsonl").stat().st_mtime_ns
    again, _ = (repeated := start(out)).communicate(timeout=200)
    assert repeated.returncode == 0, again
    assert (out / "metrics.jsonl").stat().st_mtime_ns == before, "a finished run is not trained again"
    assert "13 tasks" in again or "class_scene" in again
    assert f"All of it is in {out}:" in again
    assert f"modsquad extract '{out}' --task reshading " in again

    (tmp_path / "fewer.yaml").write_text("train: {steps: 20}")
    with pytest.raises(UserError, match=r"y holds a run of 30 steps, more than train\.steps 20: give at least as many"):
        run_quickstart(out, rooms=16, held_out=8, overrides=[str(tmp_path / "fewer.yaml")])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run_dir=elsewhere", "run_dir"),
        ("data.val=elsewhere", "data.val"),
        ("data={image_size: 32}", "data.train"),
        ("layer.yaml", "data.train"),
    ],
)
def test_everything_stays_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("layer.yaml").write_text("run_dir: run\ndata: {train: elsewhere}")
    with pytest.raises(UserError, match=rf"the overrides set {key}: .*; choose it with --out"):
        run_quickstart(Path("run"), rooms=16, held_out=8, overrides=["optim.lr=0.1", override])
    assert not Path("run").exists()
