"""Settings of DeepSpeed's communication change no result: small buckets, and reduction while backward goes on."""

from dataclasses import dataclass

import pytest

from configs.schema import RunConfig
from tests.trainer.parity import Run
from tests.trainer.parity_check import check


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
