"""Activation checkpointing: equal gradients, less kept, also where experts are spread over two ranks."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from configs.schema import RunConfig
from data_pipeline.targets import Prepared
from model.dispatch import ExpertGroup
from model.matching import Matching
from model.mod_squad import ModSquad
from tests.ranks import run_ranks
from tests.trainer.loop_run import SPECS, loop_config, random_prepared, slice_pairs
from trainer.activation_checkpointing import checkpoint_blocks
from trainer.objective import Objective

Mode = Literal["none", "recompute", "recompute_offload"]


def run(
    config: RunConfig, prepared: Prepared, mode: Mode, group: ExpertGroup | None = None
) -> tuple[float, dict[str, torch.Tensor], int]:
    """Return loss, gradients, and the bytes that the graph keeps between forward and backward."""
    model = ModSquad(config.model, SPECS, config.data.image_size, seed=1, group=group or ExpertGroup())
    checkpoint_blocks(model, mode)
    objective = Objective(model, Matching(config.matching, model.expert_layers, len(SPECS)), config, SPECS)
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss, _ = objective(prepared, 1.0)
    loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(objective.parameters()))
    return loss.item(), gradients, sum(size for place, size in kept.items() if place not in parameters)


@pytest.mark.parametrize(
    ("mode", "options"),
    [("recompute", ("model.router_noise=true", "model.shared_blocks=1")), ("recompute_offload", ())],
)
def test_gradients_are_equal_and_less_is_kept(tmp_path: Path, mode: Mode, options: tuple[str, ...]) -> None:
    config, prepared = loop_config(tmp_path, *options), random_prepared(4, [4, 4, 4, 4])
    plain_loss, plain, plain_bytes = run(config, prepared, "none")
    loss, gradients, kept = run(config, prepared, mode)
    assert loss == plain_loss
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-7, msg=name)
    assert kept < 0.5 * plain_bytes


Result = tuple[float, dict[str, torch.Tensor], int]


def _run_rank(rank: int, world: int, config: RunConfig, prepared: Prepared) -> tuple[Result, Result]:
    # Uneven: rank 1 has a single image, so the token exchanges differ in size.
    part = slice_pairs(prepared, slice(0, 3) if rank == 0 else slice(3, 4))
    group = ExpertGroup(size=world, rank=rank)
    return run(config, part, "none", group), run(config, part, "recompute", group)


def test_gradients_are_equal_with_experts_on_two_ranks(tmp_path: Path) -> None:
    results = run_ranks(_run_rank, 2, loop_config(tmp_path), random_prepared(4, [4, 2, 3, 1]))
    for (plain_loss, plain, plain_bytes), (loss, gradients, kept) in results:
        assert loss == plain_loss
        assert kept < 0.5 * plain_bytes
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-7, msg=name)
