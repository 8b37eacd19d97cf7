import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cluster.env import RankEnv
from cluster.groups import Layout
from configs.errors import UserError
from configs.schema import ParallelConfig
from tests.ranks import run_ranks
from tests.trainer.toy_model import ToyModel, toy_batches, toy_config
from trainer.optim import param_groups

STEPS, SAMPLES, LEARNING_RATE = 4, 16, 0.03

CLIPS = (0.0, 0.05)  # the gradient's norm is between 0.1 and 1


@dataclass(frozen=True)
class Case:
    ep_size: int
    stage: int
    clip_norm: float = 0.0
    accumulation: int = 1
    dtype: str = "fp32"
    recompute: bool = False


def engine_on(rank: int, world: int, case: Case) -> Any:
    from trainer.engine import Engine, expert_group, init_distributed

    parallel = {"ep_size": case.ep_size, "zero_stage": case.stage}
    config = toy_config(optim={"clip_norm": case.clip_norm}, parallel=parallel, train={"dtype": case.dtype})
    init_distributed(RankEnv(rank=rank, world=world, local_rank=rank), config.parallel)
    layout = Layout(world, case.ep_size)
    model = ToyModel(expert_group(layout), recompute=case.recompute)
    micro_batch = SAMPLES // world // case.accumulation
    return Engine(model, config, layout, accumulation=case.accumulation, micro_batch=micro_batch)


def micro_batches(batch: tuple[Tensor, Tensor], rank: int, world: int, accumulation: int) -> list[list[Tensor]]:
    parts = [tensor.chunk(world * accumulation) for tensor in batch]
    return [[part[turn * world + rank] for part in parts] for turn in range(accumulation)]


def train(engine: Any, rank: int, world: int, accumulation: int) -> dict[str, Any]:
    losses, norms, gradients = [], [], {}
    for step, batch in enumerate(toy_batches(STEPS, SAMPLES)):
        engine.set_learning_rate(LEARNING_RATE)
        loss_sum = torch.zeros(())
        for turn, (x, y) in enumerate(micro_batches(batch, rank, world, accumulation)):
            loss, _ = engine(x, y)
            engine.backward(loss)
            loss_sum += loss.detach() / (accumulation * world)
            if step == 0 and turn == accumulation - 1:
                gradients = engine.full_gradients()
            outcome = engine.step()
        torch.distributed.all_reduce(loss_sum)
        losses.append(loss_sum.item())
        norms.append(outcome.gradient_norm)
        assert not outcome.skipped
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "state": whole_state(engine),
    }


def whole_state(engine: Any) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    state = engine.logical_state()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def train_cases(rank: int, world: int, cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        engine = engine_on(rank, world, case)
        results.append(train(engine, rank, world, case.accumulation))
        engine.close()
    return results


def train_plainly(clip_norm: float) -> dict[str, Any]:
    from model.dispatch import ExpertGroup

    model = ToyModel(ExpertGroup())
    optim = toy_config().optim
    groups = param_groups(model, optim.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=optim.betas, eps=optim.eps)
    losses, norms, gradients = [], [], {}
    for x, y in toy_batches(STEPS, SAMPLES):
        adamw.zero_grad()
        loss, _ = model(x, y)
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or math.inf).item())
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


LAYOUTS: dict[int, list[Case]] = {
    1: [Case(1, stage, clip, turns) for stage in (0, 1, 2) for clip, turns in ((CLIPS[0], 2), (CLIPS[1], 1))],
    2: [
        *(Case(1, stage, CLIPS[1], 2) for stage in (0, 1, 2)),
        *(Case(2, stage, clip, turns) for stage in (0, 1, 2) for clip, turns in ((CLIPS[0], 1), (CLIPS[1], 2))),
        *(Case(2, stage, CLIPS[1], 2, recompute=True) for stage in (0, 1, 2)),
    ],
    4: [Case(2, stage, clip, 2) for stage in (0, 1, 2) for clip in CLIPS],
}


BFLOAT16 = [Case(2, stage, CLIPS[1], dtype="bf16") for stage in (0, 1, 2)]
SPOILED = [Case(2, stage) for stage in (0, 1, 2)]


def run_on_two_ranks(rank: int, world: int) -> dict[str, Any]:
    return {
        "fp32": train_cases(rank, world, LAYOUTS[2]),
        "bf16": train_cases(rank, world, BFLOAT16),
        "spoiled": [survive_bad_steps(rank, world, case) for case in SPOILED],
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    """Results of both ranks; starting ranks takes longer than all they do here."""
    return run_ranks(run_on_two_ranks, 2)


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as a world of one, without a launcher."""
    from trainer.engine import close_distributed

    with mock.patch.dict(os.environ):
        yield
        close_distributed()


@pytest.mark.usefixtures("alone")
def test_one_process_equals_plain_torch() -> None:
    assert_plain(LAYOUTS[1], train_cases(0, 1, LAYOUTS[1]))


def test_two_ranks_equal_one_plain_process(two_ranks: list[dict[str, Any]]) -> None:
    for results in two_ranks:
        assert_plain(LAYOUTS[2], results["fp32"])


def test_four_ranks_equal_one_plain_process() -> None:
    for results in run_ranks(train_cases, 4, LAYOUTS[4]):
        assert_plain(LAYOUTS[4], results)


def assert_plain(cases: list[Case], results: list[dict[str, Any]]) -> None:
    """Compare losses, gradients, gradient norms, weights and moments over several steps with plain torch."""
    references = {clip: train_plainly(clip) for clip in CLIPS}
    assert min(references[CLIPS[1]]["norms"]) > CLIPS[1], "clipping has something to do"
    for case, result in zip(cases, results, strict=True):
        try:
            assert_same(result, references[case.clip_norm], 1e-5)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_bfloat16_keeps_fp32_masters_and_clips_alike_in_every_stage(two_ranks: list[dict[str, Any]]) -> None:
    reference = train_plainly(CLIPS[1])
    for result in two_ranks[0]["bf16"]:
        for key in ("losses", "norms"):
            torch.testing.assert_close(torch.tensor(result[key]), torch.tensor(reference[key]), rtol=0.03, atol=0)
        master, expected = (x["state"]["master.experts.weight"] for x in (result, reference))
        assert not torch.equal(master, master.bfloat16().float()), "an update smaller than bf16 resolves is kept"
        torch.testing.assert_close(master, expected, rtol=0.01, atol=0.01)


def test_a_step_that_is_not_finite_is_skipped_by_all_ranks(two_ranks: list[dict[str, Any]]) -> None:
    for results in two_ranks:
        assert results["spoiled"] == [[True, True, False]] * len(SPOILED)


def survive_bad_steps(rank: int, world: int, case: Case) -> list[bool]:
    """One good step; then rank 1 spoils a gradient, then a loss alone; nothing may have changed before the next."""
    engine = engine_on(rank, world, case)
    engine.set_learning_rate(LEARNING_RATE)
    good, nan_input, inf_loss, last = toy_batches(4, SAMPLES)
    assert not step_once(engine, good, rank, world).skipped
    before = whole_state(engine)
    spoiled = torch.where(torch.arange(SAMPLES)[:, None] < SAMPLES // 2, nan_input[0], math.nan)
    outcomes = [step_once(engine, (spoiled, nan_input[1]), rank, world)]
    outcomes.append(step_once(engine, inf_loss, rank, world, added_loss=math.inf if rank == 1 else 0.0))
    assert all(outcome.gradient_norm == math.inf for outcome in outcomes)
    after = whole_state(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    outcomes.append(step_once(engine, last, rank, world))
    changed = whole_state(engine)
    assert changed["step"] == 2
    assert not torch.equal(changed["master.first.weight"], before["master.first.weight"])
    engine.close()
    return [outcome.skipped for outcome in outcomes]


def step_once(engine: Any, batch: tuple[Tensor, Tensor], rank: int, world: int, added_loss: float = 0.0) -> Any:
    ((x, y),) = micro_batches(batch, rank, world, 1)
    engine.backward(engine(x, y)[0] + added_loss)
    return engine.step()


def test_ep_size_must_divide_the_world() -> None:
    from trainer.engine import init_distributed

    with pytest.raises(UserError, match="ep_size 3 does not divide the world of 4"):
        init_distributed(RankEnv(rank=0, world=4), ParallelConfig(ep_size=3))
