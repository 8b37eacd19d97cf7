"""What a run is built from: the parts get what the configuration says."""

from pathlib import Path

import torch

from cluster.env import RankEnv
from model.matching import Matching
from tests.trainer.tiny_run import SIDE, tiny_config, write_shards
from tests.trainer.worlds import world_of_one
from trainer.assembly import assemble
from trainer.engine import init_distributed


def test_the_task_prior_of_the_configuration_is_that_of_the_matching_loss(tmp_path: Path) -> None:
    write_shards(tmp_path / "val", 2)
    config = tiny_config(tmp_path)
    skewed = config.matching.model_copy(update={"task_prior": {"normal": 8.0}})
    with world_of_one():
        init_distributed(RankEnv(), config.parallel)
        parts = assemble(config.model_copy(update={"matching": skewed}), RankEnv())
        images, tasks = torch.randn(2, 3, SIDE, SIDE), torch.tensor([0, 1, 2])
        routing = parts.model(images, torch.tensor([0, 1, 1]), tasks).routing
        expected = Matching(skewed, parts.model.expert_layers, 3, prior=[1.0, 1.0, 8.0])(routing, None)
        uniform = Matching(skewed, parts.model.expert_layers, 3)(routing, None)
        found = parts.matching(routing, None)
        parts.engine.close()
    assert found.mutual_information == expected.mutual_information
    assert found.mutual_information != uniform.mutual_information
