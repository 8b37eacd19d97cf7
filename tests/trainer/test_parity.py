"""Training on any layout equals plain PyTorch in one process: losses, gradients, norms, weights after 20 AdamW steps.

Every pair of values of any two factors (layout, ZeRO stage, precision, accumulation, clipping, routing, router noise)
occurs; every triple under the marker `faults`.
"""

import pytest

from tests.trainer.parity import Run, covering_runs
from tests.trainer.parity_check import check, plain


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_pair_of_factors(world: int) -> None:
    check([run for run in covering_runs(2) if run.world == world])


@pytest.mark.faults
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_triple_of_factors(world: int, dtype: str) -> None:
    check([run for run in covering_runs(3) if (run.world, run.dtype) == (world, dtype)])


def test_experts_without_tokens_have_no_gradient_and_only_decay() -> None:
    run = Run(world=1, ep_size=1, stage=0, dtype="fp32", accumulation=1, clips=False, routing="one_expert")
    gradients = plain(run)["gradients"]
    experts = [name for name in gradients if ".experts.w" in name]
    assert experts
    for name in experts:
        assert gradients[name][0].abs().max() > 0
        assert gradients[name][1:].abs().max() == 0
