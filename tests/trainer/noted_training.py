"""Trains as `modsquad train` does, and notes which samples every finished step has used and where experts lie.

As a program it is one rank of a run. Arguments: the folder of `loop_run.make_shards`, then overrides. After the step
that the variable STOP_AFTER names, if any, it sends itself SIGTERM.
"""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

from cluster.env import RankEnv, detect
from cluster.local import die_with_launcher
from configs.schema import RunConfig
from data_pipeline.batch import Batch
from data_pipeline.targets import Prepared, prepare_batch
from tests.trainer.loop_run import loop_config
from trainer.distributed.rank_process import run_to_the_end
from trainer.engine import StepOutcome
from trainer.loop import Trainer
from trainer.progress import StepListener


class NotedTrainer(Trainer):
    """Appends {"step", "keys"} of every finished step to `keys_START_RANK.jsonl` in the run folder.

    Rank 0 appends {"step", "moved", "shadowed"} to `places.jsonl` when experts go to other places: how many leave their
    order, how many are shadowed.
    """

    def __init__(self, config: RunConfig, env: RankEnv, listener: StepListener | None = None) -> None:
        super().__init__(config, env, listener)
        self._notes = self.run_dir / f"keys_{self.state.steps_done:04d}_{env.rank}.jsonl"

    def step(self) -> StepOutcome:
        keys: list[str] = []

        def noted(batch: Batch, *args: object) -> Prepared:
            keys.extend(batch.keys)
            return prepare_batch(batch, *args)  # type: ignore[arg-type]

        with mock.patch("trainer.loop.prepare_batch", noted):
            outcome = super().step()
        with self._notes.open("a") as file:
            print(json.dumps({"step": self.state.steps_done, "keys": keys}), file=file, flush=True)
        if os.environ.get("STOP_AFTER") == str(self.state.steps_done):
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    def _place_experts(self) -> bool:
        placed = super()._place_experts()
        if placed and self.env.is_main:
            assert self._placement is not None
            layers = self._placement.layers.values()
            moved = sum(place != expert for layer in layers for place, expert in enumerate(layer.order))
            shadowed = sum(len(layer.shadowed) for layer in layers)
            line = {"step": self.state.steps_done, "moved": moved, "shadowed": shadowed}
            with (self.run_dir / "places.jsonl").open("a") as file:
                print(json.dumps(line), file=file, flush=True)
        return placed


def train(folder: Path, env: RankEnv, *overrides: str, listener: StepListener | None = None) -> None:
    NotedTrainer(loop_config(folder, *overrides), env, listener).fit()


def keys_of_steps(run_dir: Path) -> dict[int, list[str]]:
    """Return the sorted keys of every step over all ranks; of a step that was done again, the last time."""
    steps: dict[int, list[str]] = {}
    starts = sorted({file.name.split("_")[1] for file in run_dir.glob("keys_*.jsonl")})
    for start in starts:
        again: dict[int, list[str]] = {}
        for file in run_dir.glob(f"keys_{start}_*.jsonl"):
            for line in map(json.loads, file.read_text().splitlines()):
                again[line["step"]] = sorted([*again.get(line["step"], []), *line["keys"]])
        steps |= again
    return steps


def placed_experts(run_dir: Path) -> dict[int, tuple[int, int]]:
    """Return how many experts of all layers left their order, and are shadowed, at each step that chose new places."""
    path = run_dir / "places.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {line["step"]: (line["moved"], line["shadowed"]) for line in lines}


if __name__ == "__main__":
    die_with_launcher()
    env = detect()
    sys.exit(run_to_the_end(lambda: train(Path(sys.argv[1]), env, *sys.argv[2:]), env))
