"""The objective: split over ranks and passes it is the same, every parameter takes part, statistics are detached."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.schema import RunConfig
from data_pipeline.targets import Prepared
from model.matching import Matching
from model.mod_squad import ModSquad
from tests.ranks import run_ranks
from tests.trainer.loop_run import NAMES, SPECS, loop_config, random_prepared, slice_pairs
from trainer.losses import pair_losses
from trainer.objective import Objective


def make_objective(config: RunConfig) -> Objective:
    model = ModSquad(config.model, SPECS, config.data.image_size, seed=1)
    return Objective(model, Matching(config.matching, model.expert_layers, len(SPECS)), config, SPECS)


def gradients(objective: Objective) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part"
        found[name] = parameter.grad.clone()
    return found


def test_total_is_the_weighted_sum_of_means_over_pairs_plus_matching(tmp_path: Path) -> None:
    config = loop_config(tmp_path, "train.task_weights.normal=3")
    objective, prepared = make_objective(config), random_prepared(4, [4, 2, 3, 1])
    loss, statistics = objective(prepared, 1.0)
    output = objective.model(prepared.images, prepared.pair_image, prepared.pair_task)
    means = [pair_losses(spec, output.predictions[spec.name], prepared.targets[spec.name]).mean() for spec in SPECS]
    expected = means[0] + 3 * means[1] + means[2] + means[3] + statistics.matching_loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(statistics.loss_sum_T / statistics.pairs_T, torch.stack(means))
    assert statistics.pairs_T.tolist() == [4, 2, 3, 1]
    assert not any(
        value.requires_grad for layer in statistics.routing for value in vars(layer).values() if torch.is_tensor(value)
    )


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_accumulated_passes_average_to_the_whole(tmp_path: Path, weighting: str) -> None:
    config = loop_config(tmp_path, f"train.task_weighting={weighting}", "matching.weight=0")
    objective, prepared = make_objective(config), random_prepared(4, [4, 2, 3, 1])
    whole, _ = objective(prepared, 1.0)
    whole.backward()
    expected = gradients(objective)
    objective.zero_grad()
    total = 0.0
    for part in (slice(0, 1), slice(1, 4)):
        loss, _ = objective(slice_pairs(prepared, part), 2.0)
        (loss / 2).backward()
        total += loss.item() / 2
    assert total == pytest.approx(whole.item(), rel=1e-5)
    for name, gradient in gradients(objective).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_two_passes_over_the_same_pairs_are_one_matching_included(tmp_path: Path) -> None:
    objective, prepared = make_objective(loop_config(tmp_path, "matching.weight=0.5")), random_prepared(4, [4, 2, 3, 1])
    whole, _ = objective(prepared, 1.0)
    whole.backward()
    expected = gradients(objective)
    objective.zero_grad()
    half = replace(prepared, global_pairs=2 * prepared.global_pairs)  # each pass holds half of the step's pairs
    for _ in range(2):
        loss, statistics = objective(half, 2.0)
        (loss / 2).backward()
        assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
        assert statistics.matching_loss.item() < 0
    for name, gradient in gradients(objective).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_without_images_and_without_some_tasks_the_graph_is_the_same(tmp_path: Path) -> None:
    objective = make_objective(loop_config(tmp_path))
    for prepared in (random_prepared(0, [0, 0, 0, 0]), random_prepared(3, [3, 0, 0, 0])):
        objective.zero_grad()
        loss, statistics = objective(prepared, 1.0)
        loss.backward()
        gradients(objective)
        assert loss.isfinite()
        assert statistics.loss_sum_T[1:].tolist() == [0.0] * (len(NAMES) - 1)


def _share_of_rank(
    rank: int, world: int, config: RunConfig, prepared: Prepared
) -> tuple[float, dict[str, torch.Tensor]]:
    objective = make_objective(config)
    part = slice_pairs(prepared, slice(0, 3) if rank == 0 else slice(3, 4))
    loss, _ = objective(part, float(world))
    loss.backward()
    return loss.item(), gradients(objective)


def test_two_ranks_average_to_one_process_matching_included(tmp_path: Path) -> None:
    config, prepared = loop_config(tmp_path, "matching.weight=0.5"), random_prepared(4, [4, 2, 3, 1])
    objective = make_objective(config)
    whole, _ = objective(prepared, 1.0)
    whole.backward()
    results = run_ranks(_share_of_rank, 2, config, prepared)
    assert sum(loss for loss, _ in results) / 2 == pytest.approx(whole.item(), rel=1e-5)
    for name, expected in gradients(objective).items():
        mean = (results[0][1][name] + results[1][1][name]) / 2
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-6, msg=name)
