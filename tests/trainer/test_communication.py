"""Settings of DeepSpeed's communication change no result: small buckets, and reduction while backward goes on."""

from dataclasses import dataclass
from unittest import mock

import deepspeed
import pytest

from cluster.env import RankEnv
from cluster.groups import Layout
from configs.schema import RunConfig
from model.dispatch import ExpertGroup
from tests.trainer.parity import Run
from tests.trainer.parity_check import check
from tests.trainer.toy_model import ToyModel, toy_config
from tests.trainer.worlds import world_of_one
from trainer.engine import Engine, init_distributed
from trainer.footprint.plan import memory_per_rank


@dataclass(frozen=True)
class CommunicationRun(Run):
    bucket_elements: int = 1000
    """Fewer than the model's largest parameter has."""
    overlaps: bool = False

    @property
    def config(self) -> RunConfig:
        config = super().config
        changed = {"bucket_elements": self.bucket_elements, "overlap_communication": self.overlaps}
        return config.model_copy(update={"parallel": config.parallel.model_copy(update=changed)})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_losses_gradients_and_weights_stay(dtype: str) -> None:
    check(
        [
            CommunicationRun(2, ep_size, stage, dtype, accumulation=2, clips=True, routing="few_tasks", overlaps=over)
            for ep_size in (1, 2)
            for stage in (1, 2)
            for over in (False, True)
        ]
    )


def test_settings_reach_deepspeed() -> None:
    config = toy_config(parallel={"bucket_elements": 14, "overlap_communication": True})
    with world_of_one(), mock.patch("deepspeed.initialize", wraps=deepspeed.initialize) as initialize:
        init_distributed(RankEnv(), config.parallel)
        Engine(ToyModel(ExpertGroup()), config, Layout(1, 1), accumulation=1, micro_batch=1).close()
    zero = initialize.call_args.kwargs["config"]["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"], zero["overlap_comm"]) == (14, 14, True)


def test_smaller_buckets_are_planned_with_less_memory() -> None:
    config = RunConfig()
    small = config.model_copy(update={"parallel": config.parallel.model_copy(update={"bucket_elements": 1000})})
    planned = [memory_per_rank(run, Layout(2, 1), 1, 1).gradients for run in (config, small)]
    assert planned[0] - planned[1] == pytest.approx(8 * (planned[0] / 12 - 1000))
