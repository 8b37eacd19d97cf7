"""What a rank of a test's job runs: training, whose steps last PACE_SECONDS longer until the job is started again."""

import os
import time

from cluster.env import RankEnv
from configs.load import load_config
from trainer.distributed.rank_process import load_on_all, run_to_the_end
from trainer.engine import StepOutcome
from trainer.loop import Trainer

ENTRY = f"{__name__}:train_rank"


class PacedTrainer(Trainer):
    def step(self) -> StepOutcome:
        if "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(float(os.environ["PACE_SECONDS"]))
        return super().step()


def train_rank(config: str, env: RankEnv) -> int:
    def action() -> None:
        PacedTrainer(load_on_all(lambda: load_config(config), env), env).fit()

    return run_to_the_end(action, env)
