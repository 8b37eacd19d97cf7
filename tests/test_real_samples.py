"""Real label files in the official encodings go the whole road: pack, check, train ten steps, evaluate, extract."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.tasks import GROUPS

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "real_samples"
TASKS = ",".join(name for name in GROUPS["taskonomy"] if not name.startswith("class_"))


def modsquad(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "trainer.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"the real samples are not at {SAMPLES}")
@pytest.mark.timeout(600)
def test_real_samples_go_the_whole_road(tmp_path: Path) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    packed = modsquad("data", "pack", "taskonomy", SAMPLES, shards, "--size", "64", "--tasks", TASKS)
    assert "2 samples" in packed
    problems = [json.loads(line) for line in (shards / "problems.jsonl").read_text().splitlines()]
    assert [problem["task"] for problem in problems] == ["depth_zbuffer"], "the 8-bit picture of a depth map"
    assert "hypersim" in json.dumps(problems)
    assert "depth_zbuffer" in modsquad("data", "check", shards)

    modsquad(
        "train", "quickstart", f"run_dir={run}", f"data.train={shards}", f"data.val={shards}", f"tasks=[{TASKS}]",
        "train.steps=10", "optim.warmup_steps=1", "train.log_every_steps=1", "train.images_per_step=2",
        "parallel.ep_size=1", "model.width=32", "model.depth=2", "model.shared_blocks=1",
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all(line["loss"] is not None for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]

    evaluation = json.loads((run / "evaluation" / "step_00000010_val.json").read_text())
    assert evaluation["images"] == 2
    assert all(score["value"] is not None for score in evaluation["tasks"].values())
    assert lines[0]["pairs"]["depth_zbuffer"] == 1, "the rejected label is not trained on"
    assert "normal" in modsquad("extract", run, "--task", "normal")
    photo = SAMPLES / "rgb" / "replica" / "apartment_0" / "point_47_view_25_domain_rgb.png"
    modsquad("predict", run / "squads" / "normal", photo, "--out", tmp_path / "predictions")
    assert any((tmp_path / "predictions").glob("*normal.png"))
