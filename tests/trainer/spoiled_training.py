"""Trains as `modsquad train` does, but rank 1 spoils numbers: the loss of step 3 and of step 7 and all that follow, the
gradient of step 5. Notes the samples whose loss it has spoiled, by step. Arguments as for `noted_training`.
"""

import json
import math
import sys
from pathlib import Path
from unittest import mock

from torch import Tensor

from cluster.env import detect
from data_pipeline.batch import Batch
from data_pipeline.targets import Prepared, Target, prepare_batch
from tests.trainer.loop_run import loop_config
from trainer.distributed.rank_process import run_to_the_end
from trainer.engine import StepOutcome
from trainer.loop import Trainer

GRADIENT = 5


def spoils_loss(step: int) -> bool:
    return step == 3 or step >= 7


class SpoiledTrainer(Trainer):
    def step(self) -> StepOutcome:
        step, spoiled = self.state.steps_done + 1, self.run_dir / f"spoiled_{self.env.rank}.json"
        noted = json.loads(spoiled.read_text()) if spoiled.exists() else {}

        def prepare(batch: Batch, *args: object) -> Prepared:
            prepared = prepare_batch(batch, *args)  # type: ignore[arg-type]
            if self.env.rank == 1 and spoils_loss(step):
                noted[step] = list(batch.keys)
                spoiled.write_text(json.dumps(noted))
                target = prepared.targets["normal"]
                prepared.targets["normal"] = Target(target.values * math.nan, target.mask)
            return prepared

        def spoil(gradient: Tensor) -> Tensor:
            return gradient * math.inf if self.env.rank == 1 and step == GRADIENT else gradient

        handle = self.parts.model.backbone.patch.weight.register_hook(spoil)
        with mock.patch("trainer.loop.prepare_batch", prepare):
            outcome = super().step()
        handle.remove()
        return outcome


if __name__ == "__main__":
    env = detect()
    config = loop_config(Path(sys.argv[1]), *sys.argv[2:])
    sys.exit(run_to_the_end(lambda: SpoiledTrainer(config, env).fit(), env))
