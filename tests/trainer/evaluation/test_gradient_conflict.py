"""The cosines of task gradients: known answers, and the same numbers as one plain backward pass per task."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.tasks import TaskSpec, resolve_tasks
from data_pipeline.targets import Prepared, Target
from model.mod_squad import ModSquad
from model.vit import ExpertLayer
from tests.model.models import SIDE, VARIANTS, config, images
from trainer.evaluation.gradient_conflict import (
    measure,
    measure_run,
    pooled_cosine,
    summarise,
    summary_rows,
    task_gradients,
    weight_groups,
)
from trainer.losses import pair_losses
from trainer.run_files import ConflictLayer, read_latest_conflict

TWINS = resolve_tasks(["depth_euclidean", "depth_zbuffer"])  # the same loss


def model_of(tasks: Sequence[TaskSpec], **changes: Any) -> ModSquad:
    """A model whose replicated weights are spread out, so that routing is uneven."""
    model = ModSquad(config(**changes), tasks, SIDE, seed=3).eval()
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not hasattr(parameter, "is_expert"):
                parameter.add_(torch.randn(parameter.shape, generator=source), alpha=0.2)
    return model


def prepared_of(tasks: Sequence[TaskSpec], pairs: Sequence[int], far: Sequence[float], seed: int = 0) -> Prepared:
    """Four images; task t serves the first `pairs[t]` of them, its dense targets all `far[t]` away from any output."""
    counts = torch.tensor(list(pairs))
    targets = {
        spec.name: Target(torch.full((p, spec.channels, SIDE, SIDE), value), torch.ones(p, 1, SIDE, SIDE) > 0)
        for spec, p, value in zip(tasks, pairs, far, strict=True)
    }
    return Prepared(
        images=images(4, seed),
        targets=targets,
        pair_image=torch.cat([torch.arange(p) for p in pairs]),
        pair_task=torch.arange(len(tasks)).repeat_interleave(counts),
        global_pairs=counts,
        turns=torch.zeros(4, 2, dtype=torch.int64),
        keys=("a", "b", "c", "d"),
    )


def always(*batches: Prepared) -> Callable[[], Iterator[Prepared]]:
    return lambda: iter(batches)


def cosines(layers: Sequence[ConflictLayer], kind: str) -> Tensor:
    """The cosine of the first two tasks in every layer of a kind."""
    found = torch.tensor([layer.cosine[0][1] for layer in layers if layer.kind == kind])
    assert len(found)
    return found


def twin_model(**changes: Any) -> ModSquad:
    """Two tasks with equal heads and equal routers that see the same tokens."""
    model = model_of(TWINS, task_embedding="none", **changes)
    first, second = model.heads.values()
    second.load_state_dict(first.state_dict())
    for module in model.modules():
        if isinstance(module, ExpertLayer):
            with torch.no_grad():
                module.router.weight[1:] = module.router.weight[:1]
    return model


@pytest.mark.parametrize("placement", ["alternate", "dense"])
def test_equal_losses_agree_and_opposite_losses_conflict(placement: str) -> None:
    model = twin_model(placement=placement)
    kinds = ("shared",) if placement == "dense" else ("experts", "shared")
    agreeing = measure(model, always(prepared_of(TWINS, (4, 4), (100.0, 100.0))))
    # The gradient of |prediction - target| is the side that the target lies on.
    opposed = measure(model, always(prepared_of(TWINS, (4, 4), (100.0, -100.0))))
    for kind in kinds:
        torch.testing.assert_close(cosines(agreeing, kind), torch.ones_like(cosines(agreeing, kind)))
        torch.testing.assert_close(cosines(opposed, kind), -torch.ones_like(cosines(opposed, kind)))
    summary = summarise(pooled_cosine(opposed))
    assert (summary.mean, summary.share, summary.strength) == pytest.approx((-1, 1, 1))


def test_tasks_with_experts_of_their_own_have_cosine_zero_there() -> None:
    model = twin_model()
    for module in model.modules():
        if isinstance(module, ExpertLayer):
            half = module.info.num_experts // 2
            with torch.no_grad():  # tokens reach the router as ones, below
                module.router.weight.fill_(-1.0)
                module.router.weight[0, :, :half] = 1.0
                module.router.weight[1, :, half:] = 1.0
    for block in model.blocks:
        for part, norm in ((block.attention, block.norm1), (block.mlp, block.norm2)):
            if isinstance(part, ExpertLayer):
                nn.init.zeros_(norm.weight)
                nn.init.ones_(norm.bias)
    layers = measure(model, always(prepared_of(TWINS, (4, 4), (100.0, 100.0))))
    assert (cosines(layers, "experts") == 0).all()
    assert (cosines(layers, "shared").abs() > 0.01).any()
    assert all(norm > 0 for layer in layers for norm in layer.norms)
    # Neither conflict nor agreement, but a pair whose cosine is known.
    experts = summarise(pooled_cosine([layer for layer in layers if layer.kind == "experts"]))
    assert (experts.mean, experts.share, experts.strength) == (0, 0, 0)


TASKS = resolve_tasks(["normal", "reshading", "depth_zbuffer"])


def plain_gradients(model: ModSquad, batches: Sequence[Prepared]) -> list[dict[int, Tensor]]:
    """Per task, each parameter's gradient of the mean loss of all pairs, from one graph over everything."""
    losses: list[list[Tensor]] = [[] for _ in TASKS]
    for batch in batches:
        output = model(batch.images, batch.pair_image, batch.pair_task)
        for of_task, spec in zip(losses, TASKS, strict=True):
            of_task.append(pair_losses(spec, output.predictions[spec.name], batch.targets[spec.name]))
    parameters = list(model.backbone.parameters())
    gradients = []
    for of_task in losses:
        loss = torch.cat(of_task).mean()
        found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        gradients.append({id(x): gradient for x, gradient in zip(parameters, found, strict=True)})
    return gradients


@pytest.mark.parametrize("variant", ["published", "every", "shared", "shared router"])
def test_gradients_are_those_of_the_mean_over_all_images(variant: str) -> None:
    model = model_of(TASKS, **VARIANTS[variant])
    batches = [prepared_of(TASKS, (4, 3, 1), (0.1, 0.2, 0.3)), prepared_of(TASKS, (2, 4, 0), (0.5, -0.2, 0.3), seed=1)]
    plain = plain_gradients(model, batches)
    groups = weight_groups(model)
    expected = [
        torch.stack([torch.cat([task[id(x)].flatten() for x in group.parameters]) for task in plain])
        for group in groups
    ]
    gradients = task_gradients(model, groups, iter(batches))
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)

    layers = measure(model, always(*batches))
    for layer, gradient_TW in zip(layers, expected, strict=True):
        assert layer.weights == gradient_TW.shape[1]
        assert layer.norms == pytest.approx(gradient_TW.norm(dim=1).tolist(), rel=1e-4)
    joined = nn.functional.normalize(torch.cat(expected, dim=1), dim=1)
    assert pooled_cosine(layers) == pytest.approx((joined @ joined.T).numpy(), abs=1e-4)


def facts(layer: ConflictLayer) -> ConflictLayer:
    """The layer without its numbers."""
    return layer.model_copy(update={"norms": (), "cosine": ()})


def test_several_passes_measure_what_one_does() -> None:
    model = model_of(TASKS)
    passes = []

    def batches() -> Iterator[Prepared]:
        passes.append(1)
        yield prepared_of(TASKS, (4, 3, 1), (0.1, 0.2, 0.3))

    at_once = measure(model, batches)
    assert len(passes) == 1
    one_by_one = measure(model, batches, gradient_bytes=0)
    assert len(passes) == 1 + len(at_once)
    for left, right in zip(at_once, one_by_one, strict=True):
        assert facts(left) == facts(right)
        assert np.array(left.cosine) == pytest.approx(np.array(right.cosine), abs=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_weight_that_several_tasks_train_stands_in_one_group(changes: dict[str, Any]) -> None:
    model = model_of(TASKS, **changes)
    grouped = [id(x) for group in weight_groups(model) for x in group.parameters]
    assert len(grouped) == len(set(grouped))
    left_out = {name for name, x in model.backbone.named_parameters() if id(x) not in set(grouped)}
    one_per_task = {
        f"blocks.{info.block}.{info.kind}.router."
        for info in model.expert_layers
        if info.sees_task and model.config.routers == "task"
    }
    expected = {name for name, _ in model.backbone.named_parameters() if name.startswith(tuple(one_per_task))}
    if model.config.task_embedding != "none":
        expected.add("task_embedding")
    assert left_out == expected
    assert all(
        (group.kind == "experts") == hasattr(x, "is_expert") for group in weight_groups(model) for x in group.parameters
    )


def test_what_runs_once_per_image_is_told_apart() -> None:
    groups = weight_groups(model_of(TASKS, shared_blocks=2))
    assert {group.block for group in groups if not group.sees_task} == {None, 0, 1}
    assert {group.block for group in groups if group.sees_task} == {2}


def test_a_task_without_pairs_has_no_direction() -> None:
    layers = measure(model_of(TASKS), always(prepared_of(TASKS, (4, 0, 4), (0.1, 0.2, 0.3))))
    for layer in layers:
        assert layer.norms[1] == 0
        assert all(math.isnan(layer.cosine[1][task]) for task in range(3))
        assert math.isfinite(layer.cosine[0][2])
    pooled = pooled_cosine(layers)
    assert np.isnan(pooled[1]).all()
    assert summarise(pooled).mean == pytest.approx(pooled[0, 2])


def test_the_summary_counts_each_pair_with_a_known_cosine_once() -> None:
    nan = math.nan
    cosine = np.array([[1, 0.5, -0.1, nan], [0.5, 1, 0, nan], [-0.1, 0, 1, nan], [nan, nan, nan, nan]])
    summary = summarise(cosine)
    assert summary.mean == pytest.approx(0.4 / 3)
    assert summary.share == pytest.approx(1 / 3)
    assert summary.strength == pytest.approx(0.1 / 3)
    assert math.isnan(summarise(np.full((3, 3), nan)).mean)


def test_a_run_is_measured_into_its_folder(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    record = measure_run(run, images=4)
    assert (record.step, record.images, record.tasks) == (7, 4, ("class_scene", "depth_zbuffer", "normal"))
    assert (run / "conflict" / "step_00000007.json").is_file()
    assert read_latest_conflict(run) == record
    assert [name for name, _, _ in summary_rows(record)] == ["experts", "shared weights", "run once per image"]
    assert all(math.isfinite(conflict.mean) for _, _, conflict in summary_rows(record))


def test_one_task_meets_no_conflict(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = model_of(TASKS[:1])
    monkeypatch.setattr("trainer.evaluation.gradient_conflict.load_run_model", lambda *_: (alone, None, 1))
    with pytest.raises(UserError, match="one task only"):
        measure_run(tiny_run, images=4)
