"""Training on any layout equals plain PyTorch in one process: losses, gradients, norms, weights after 20 AdamW steps.

Every pair of values of any two factors (layout, ZeRO stage, precision, accumulation, clipping, routing) occurs here;
every triple under the marker `faults`.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer.parity import CLIP_NORM, Run, covering_runs, train_on_ranks, train_plainly
from tests.trainer.worlds import world_of_one

TOLERANCE = {"fp32": 1e-5, "bf16": 0.03}
"""bf16 keeps 8 bits: each rounding errs by up to 2^-9 = 0.2 %. A rank rounds the gradient of its own samples, one
process that of all of them, and over 20 steps a few tokens near a tie choose another expert."""


@functools.cache
def plain(run: Run) -> dict[str, Any]:
    return train_plainly(run)


def assert_equal_to_plain(run: Run, result: dict[str, Any]) -> None:
    reference, tolerance = plain(replace(run, world=1, ep_size=1, stage=0)), TOLERANCE[run.dtype]
    assert min(reference["norms"]) > CLIP_NORM, "clipping has something to do"
    for key in ("losses", "norms"):
        torch.testing.assert_close(
            torch.tensor(result[key]),
            torch.tensor(reference[key]),
            rtol=tolerance,
            atol=0,
            msg=lambda text, key=key: f"{run}: {key}: {text}",
        )
    for key in ("gradients", "state"):
        assert result[key].keys() == reference[key].keys()
        for name, value in reference[key].items():
            # In bf16, of a tensor as a whole: single small numbers have no leading bit in common.
            error = (result[key][name] - value).norm() / value.norm().clamp(min=1e-12)
            if run.dtype == "bf16":
                limit = 5 * tolerance if key == "gradients" or "exp_avg" in name else tolerance
                assert error < limit, f"{run}: {key} of {name} differ by {error:.1e}"
                continue
            torch.testing.assert_close(
                result[key][name],
                value,
                rtol=tolerance,
                atol=tolerance * value.abs().max().item(),
                msg=lambda text, name=name: f"{run}: {name}: {text}",
            )


def check(runs: Sequence[Run]) -> None:
    by_world: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        by_world[run.world].append(run)
    for world, of_world in by_world.items():
        if world == 1:
            with world_of_one():
                by_rank = [train_on_ranks(0, 1, of_world)]
        else:
            by_rank = run_ranks(train_on_ranks, world, of_world, timeout_seconds=280.0)
        for results in by_rank:
            for run, result in zip(of_world, results, strict=True):
                assert_equal_to_plain(run, result)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_pair_of_factors(world: int) -> None:
    check([run for run in covering_runs(2) if run.world == world])


def test_experts_without_tokens_have_no_gradient_and_only_decay() -> None:
    run = Run(world=1, ep_size=1, stage=0, dtype="fp32", accumulation=1, clips=False, routing="one_expert")
    gradients = plain(run)["gradients"]
    experts = [name for name in gradients if ".experts.w" in name]
    assert experts
    for name in experts:
        assert gradients[name][0].abs().max() > 0
        assert gradients[name][1:].abs().max() == 0
