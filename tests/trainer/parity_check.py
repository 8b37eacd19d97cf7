"""Runs trainings on ranks and compares each with plain PyTorch."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tests.ranks import run_ranks
from tests.trainer.parity import CLIP_NORM, Run, train_on_ranks, train_plainly
from tests.trainer.worlds import world_of_one

TOLERANCE = {"fp32": 1e-5, "bf16": 0.03}
"""bf16 keeps 8 bits: each rounding errs by up to 2^-9 = 0.2 %. A rank rounds the gradient of its own samples, one
process that of all of them, and over 20 steps a few tokens near a tie choose another expert."""


@functools.cache
def plain(run: Run) -> dict[str, Any]:
    return train_plainly(run)


def assert_equal_to_plain(run: Run, result: dict[str, Any]) -> None:
    reference, tolerance = plain(replace(run, world=1, ep_size=1, stage=0, moves=False)), TOLERANCE[run.dtype]
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
