"""Trains as `modsquad train` does, and notes which samples every finished step has used.

As a program it is one rank of a run. Arguments: the folder of `loop_run.make_shards`, then overrides.
"""

import json
import sys
from pathlib import Path
from unittest import mock

from cluster.env import RankEnv, detect
from cluster.local import die_with_launcher
from configs.errors import UserError
from data_pipeline.batch import Batch
from data_pipeline.targets import Prepared, prepare_batch
from tests.trainer.loop_run import loop_config
from trainer.engine import StepOutcome
from trainer.loop import Interrupted, Trainer


class NotedTrainer(Trainer):
    """Appends {"step", "keys"} of every finished step to `keys_RANK.jsonl` in the run folder."""

    def step(self) -> StepOutcome:
        keys: list[str] = []

        def noted(batch: Batch, *args: object) -> Prepared:
            keys.extend(batch.keys)
            return prepare_batch(batch, *args)  # type: ignore[arg-type]

        with mock.patch("trainer.loop.prepare_batch", noted):
            outcome = super().step()
        with (self.run_dir / f"keys_{self.env.rank}.jsonl").open("a") as file:
            print(json.dumps({"step": self.state.steps_done, "keys": keys}), file=file, flush=True)
        return outcome


def train(folder: Path, env: RankEnv, *overrides: str) -> None:
    NotedTrainer(loop_config(folder, *overrides), env).fit()


def keys_of_steps(run_dir: Path) -> dict[int, list[str]]:
    """Return the sorted keys of every step over all ranks; of a step that was done twice, the last time."""
    steps: dict[int, list[str]] = {}
    for file in sorted(run_dir.glob("keys_*.jsonl")):
        of_rank = {line["step"]: line["keys"] for line in map(json.loads, file.read_text().splitlines())}
        for step, keys in of_rank.items():
            steps[step] = sorted([*steps.get(step, []), *keys])
    return steps


if __name__ == "__main__":
    die_with_launcher()
    try:
        train(Path(sys.argv[1]), detect(), *sys.argv[2:])
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_status)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
