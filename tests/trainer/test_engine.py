import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.env import RankEnv
from configs.errors import UserError
from configs.schema import ParallelConfig
from model.dispatch import ExpertGroup
from tests.trainer.toy_model import toy_config
from tests.trainer.worlds import (
    BFLOAT16,
    CLIPS,
    LAYOUTS,
    LEARNING_RATE,
    SPOILED,
    STEPS,
    Case,
    launched,
    train_cases,
    world_of_one,
)
from trainer.engine import init_distributed
from trainer.optim import param_groups


@functools.cache
def train_plainly(case: Case) -> dict[str, Any]:
    model = case.model(ExpertGroup(), None)
    optim = toy_config().optim
    groups = param_groups(model, optim.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=optim.betas, eps=optim.eps)
    losses, norms, gradients = [], [], {}
    for x, y in case.batches():
        adamw.zero_grad()
        loss, _ = model(x, y)
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip_norm or math.inf).item())
        adamw.step()
        losses.append(loss.item())
    state: dict[str, Tensor] = {"step": torch.tensor(float(STEPS))}
    for name, parameter in model.named_parameters():
        state[f"master.{name}"] = parameter.detach()
        state |= {f"{moment}.{name}": adamw.state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq")}
    return {"losses": losses, "norms": norms, "gradients": gradients, "state": state}


def assert_same(result: dict[str, Any], reference: dict[str, Any], tolerance: float) -> None:
    for key in ("losses", "norms"):
        torch.testing.assert_close(torch.tensor(result[key]), torch.tensor(reference[key]), rtol=tolerance, atol=0)
    for key in ("gradients", "state"):
        assert result[key].keys() == reference[key].keys()
        for name, value in reference[key].items():
            scale = value.abs().max().item()
            torch.testing.assert_close(
                result[key][name],
                value,
                rtol=tolerance,
                atol=tolerance * scale,
                msg=lambda m, name=name: f"{name}: {m}",
            )


def test_one_process_equals_plain_torch() -> None:
    with world_of_one():
        assert_plain(LAYOUTS[1], train_cases(0, 1, LAYOUTS[1]))


def test_two_ranks_equal_one_plain_process() -> None:
    for results in launched().two_ranks:
        assert_plain(LAYOUTS[2], results["fp32"])


def test_four_ranks_equal_one_plain_process() -> None:
    for results in launched().four_ranks:
        assert_plain(LAYOUTS[4], results["fp32"])


def assert_plain(cases: list[Case], results: list[dict[str, Any]]) -> None:
    """Compare losses, gradients, gradient norms, weights and moments over several steps with plain torch."""
    for case, result in zip(cases, results, strict=True):
        reference = train_plainly(Case(1, 0, case.clip_norm, squad=case.squad))
        assert min(reference["norms"]) > CLIPS[1], "clipping has something to do"
        try:
            assert_same(result, reference, 1e-5)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_bfloat16_keeps_fp32_masters_and_clips_alike_in_every_stage() -> None:
    for case, result in zip(BFLOAT16, launched().two_ranks[0]["bf16"], strict=True):
        reference = train_plainly(Case(1, 0, CLIPS[1], squad=case.squad))
        for key in ("losses", "norms"):
            torch.testing.assert_close(torch.tensor(result[key]), torch.tensor(reference[key]), rtol=0.03, atol=0)
        masters = {name: value for name, value in result["state"].items() if name.startswith("master.")}
        for name, master in masters.items():
            torch.testing.assert_close(master, reference["state"][name], rtol=0.01, atol=0.01)
        finer = [name for name, master in masters.items() if not torch.equal(master, master.bfloat16().float())]
        assert len(finer) > len(masters) / 2, "updates smaller than bf16 resolves are kept"


def test_a_collective_that_hangs_ends_after_the_timeout() -> None:
    seconds = launched().two_ranks[0]["hang_seconds"]
    assert len(seconds) == 2
    assert all(0.9 < waited < 10 for waited in seconds)


def test_a_step_that_is_not_finite_is_skipped_by_all_ranks() -> None:
    for results in launched().two_ranks:
        assert results["spoiled"] == [[True, True, False]] * len(SPOILED)


def test_ep_size_must_divide_the_world() -> None:
    with pytest.raises(UserError, match="ep_size 3 does not divide the world of 4"):
        init_distributed(RankEnv(rank=0, world=4), ParallelConfig(ep_size=3))
