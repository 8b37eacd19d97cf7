"""Real trials: what they measure, whom they blame when they fail, and a search that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.env import RankEnv
from configs.load import dump_config, load_config
from configs.schema import RunConfig
from tests.ranks import run_ranks
from tests.services.waiting import wait_until
from tests.trainer.loop_run import loop_config, make_shards
from trainer.tune.runs import LocalRunner, Stopped, Trial, failure_in
from trainer.tune.trial import TrialFigures, TrialRequest, measure, read_figures

SEARCH = (
    "train.micro_batch=1,2",
    "parallel.zero_stage=1,2",
    "data.workers=0",
    "train.activation_checkpointing=none",
)

# Kills the processes of trials with one image at a time in ZeRO 2, as the kernel does for want of memory.
KILLER = """
import os, sys, signal
arguments = open("/proc/self/cmdline").read().split("\\0")
if "tune-trial" in arguments:
    text = open(arguments[arguments.index("tune-trial") + 1]).read()
    if "micro_batch: 1\\n" in text and "zero_stage: 2\\n" in text:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    make_shards(folder)
    return folder


def measure_on(rank: int, world: int, config: RunConfig, requests: list[TrialRequest]) -> list[TrialFigures]:
    env = RankEnv(rank=rank, world=world, local_rank=rank)
    return [measure(config, request, env) for request in requests]


def test_a_trial_times_steps_and_is_stopped_when_it_is_slow(shards: Path, tmp_path: Path) -> None:
    config = loop_config(shards, f"run_dir={tmp_path}", "train.images_per_step=8", "train.micro_batch=2")
    requests = [
        TrialRequest(steps=5, warmup_steps=2),
        TrialRequest(steps=5, warmup_steps=1, slowest_seconds=1e-9),
        TrialRequest(steps=5, warmup_steps=1, slowest_seconds=1e9),
    ]
    found = run_ranks(measure_on, 2, config, requests)
    assert found[0] == found[1]
    whole, slow, fast = found[0]
    assert len(whole.step_seconds) == 3
    assert not whole.stopped
    assert slow.stopped
    assert len(slow.step_seconds) == 2
    assert (fast.stopped, len(fast.step_seconds)) == (False, 4)
    for figures in found[0]:
        assert all(0 <= figures.data_wait_seconds < max(figures.step_seconds) for _ in figures.step_seconds)
        assert all(2**27 < peak < 2**33 for peak in figures.peak_bytes)
        assert len(figures.peak_bytes) == 2
    assert read_figures(tmp_path) == fast
    assert not list((tmp_path / "checkpoints").glob("*"))
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("logs", "found"),
    [
        (["step 1\nerror: no space\n", "error: rank 1 lost rank 0\n"], "no space"),
        (["error: rank 0 lost rank 1\n", "Traceback\ntorch.OutOfMemoryError: CUDA out of memory\n"], "torch.OutOfMem"),
        (["a line\nValueError: wrong\nthe end\n", ""], "ValueError: wrong"),
        (["first\nlast\n", ""], "last"),
        (["", ""], None),
    ],
)
def test_of_what_failing_ranks_say_the_cause_is_taken(tmp_path: Path, logs: list[str], found: str | None) -> None:
    paths = [tmp_path / f"rank_{rank}.log" for rank in range(2)]
    for path, text in zip(paths, logs, strict=True):
        path.write_text(text)
    told = failure_in([*paths, tmp_path / "missing.log"])
    assert told == found if found is None else (told or "").startswith(found)


def run_one(folder: Path, program: str) -> list[tuple[int, str | None]]:
    """Run a trial whose ranks run `program`; return what is told."""
    told: list[tuple[int, str | None]] = []
    folder.mkdir(exist_ok=True)
    runner = LocalRunner(ranks=2, command=(sys.executable, "-c", program))
    runner([Trial(folder, "seed: 1\n")], lambda place, reason: told.append((place, reason)))
    return told


def test_a_trial_whose_ranks_fail_says_why(tmp_path: Path) -> None:
    program = (
        "import os, sys; sys.exit('error: rank 0 lost rank 1' if os.environ['RANK'] == '0' else 'error: no shard')"
    )
    assert run_one(tmp_path / "trial", program) == [(0, "no shard")]
    assert run_one(tmp_path / "trial", "import os; os.kill(os.getpid(), 9)") == [
        (0, "rank 0 was ended by SIGKILL (out of memory?)")
    ]
    assert run_one(tmp_path / "trial", "import sys; assert open(sys.argv[1]).read() == 'seed: 1\\n'") == [(0, None)]


def test_a_signal_ends_the_search_and_not_the_trial(tmp_path: Path) -> None:
    program = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(20)"
    with pytest.raises(Stopped) as stopped:
        run_one(tmp_path / "trial", program)
    assert stopped.value.exit_status == 128 + signal.SIGINT


def test_a_trial_that_was_over_when_the_search_was_ended_is_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "trial.json").write_text("{}")
    assert run_one(tmp_path / "trial", "import sys; sys.exit(1)") == [(0, None)]


def trials_of(out: Path) -> list[dict[str, Any]]:
    path = out / "trials.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_search_that_is_killed_goes_on_and_a_killed_trial_is_a_result(shards: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "search"
    overrides = [f"run_dir={tmp_path}/run", "train.images_per_step=4", "train.micro_batch=2"]
    recipe.write_text(dump_config(loop_config(shards, *overrides)))
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    options = ["--budget", "4", "--steps", "3", "--ranks", "1", "--out", str(out)]
    command = [sys.executable, "-m", "trainer.cli", "tune", str(recipe), *options]
    command += [part for given in SEARCH for part in ("--search", given)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}", "COLUMNS": "200"}

    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: (1, "started") in [(line["trial"], line["status"]) for line in trials_of(out)], 120, "trial 1")
    first.send_signal(signal.SIGKILL)
    first.wait()
    ended = trials_of(out)
    measured = (out / "trials" / "000" / "trial.json").stat().st_mtime_ns

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = trials_of(out)
    assert lines[: len(ended)] == ended
    over = [line for line in lines if line["status"] != "started"]
    assert [line["trial"] for line in over] == [0, 1, 2, 3]
    assert (out / "trials" / "000" / "trial.json").stat().st_mtime_ns == measured, "what is over is not run again"
    failed = [line for line in over if line["status"] == "failed"]
    assert [line["values"] for line in failed] == [{"train.micro_batch": 1, "parallel.zero_stage": 2}]
    assert failed[0]["reason"] == "rank 0 was ended by SIGKILL (out of memory?)"
    assert "trial 0: " not in done.stdout
    assert "failed (rank 0 was ended by SIGKILL (out of memory?))" in done.stdout

    best = max((line for line in over if line["status"] == "done"), key=lambda line: float(line["images_per_second"]))
    tuned = load_config(recipe, [str(out / "tuned.yaml")])
    assert tuned.train.micro_batch == best["values"]["train.micro_batch"]
    assert tuned.parallel.zero_stage == best["values"]["parallel.zero_stage"]
    assert (out / "tuning.png").is_file()
    assert not list(out.glob("trials/*/checkpoints/*"))
