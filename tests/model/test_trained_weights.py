"""A new model from a trained one: shared parts by name, rows of tasks by the task's name."""

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import ModelConfig
from configs.tasks import TASKS
from model.dispatch import ExpertGroup
from model.mod_squad import ModSquad
from model.trained_weights import start_from_trained

OLD, NEW = ("normal", "keypoints2d", "depth_zbuffer"), ("depth_zbuffer", "edge_texture", "normal")
SIZES = {
    "width": 16,
    "depth": 2,
    "heads": 2,
    "patch_size": 8,
    "attention_experts": 4,
    "attention_top_k": 2,
    "mlp_experts": 4,
    "mlp_top_k": 2,
    "placement": "every",
}


def built(
    tasks: tuple[str, ...], *, seed: int, side: int = 32, ranks: int = 1, rank: int = 0, **sizes: object
) -> ModSquad:
    config = ModelConfig.model_validate({**SIZES, **sizes})
    group = ExpertGroup(size=ranks, rank=rank, process_group=None)
    return ModSquad(config, [TASKS[name] for name in tasks], side, seed=seed, group=group)


def forward(model: ModSquad, task: str, images: Tensor) -> Tensor:
    number = [spec.name for spec in model.tasks].index(task)
    pairs = len(images)
    with torch.no_grad():
        output = model.eval()(images, torch.arange(pairs), torch.full((pairs,), number))
    return output.predictions[task]


@pytest.mark.parametrize("sizes", [{}, {"shared_blocks": 1}, {"routers": "shared"}, {"router_noise": True}])
def test_tasks_of_both_compute_what_they_did(sizes: dict[str, object]) -> None:
    trained, model = built(OLD, seed=1, **sizes), built(NEW, seed=2, **sizes)
    taken = start_from_trained(model, trained, "old")
    assert (taken.taken, taken.new, taken.unused) == (("depth_zbuffer", "normal"), ("edge_texture",), ("keypoints2d",))
    images = torch.rand(2, 3, 32, 32)
    for task in taken.taken:
        torch.testing.assert_close(forward(model, task, images), forward(trained, task, images), rtol=0, atol=0)


def test_a_new_task_keeps_its_own_start() -> None:
    trained, model, fresh = built(OLD, seed=1), built(NEW, seed=2), built(NEW, seed=2)
    start_from_trained(model, trained, "old")
    row = NEW.index("edge_texture")
    assert model.backbone.task_embedding[row].equal(fresh.backbone.task_embedding[row])
    name = "blocks.1.mlp.router.weight"
    assert model.backbone.get_parameter(name)[row].equal(fresh.backbone.get_parameter(name)[row])
    for name, value in fresh.heads["edge_texture"].named_parameters():
        assert model.heads["edge_texture"].get_parameter(name).equal(value)


def test_shards_receive_their_own_experts() -> None:
    trained = built(OLD, seed=1)
    shards = [built(OLD, seed=2, ranks=2, rank=rank) for rank in range(2)]
    for shard in shards:
        start_from_trained(shard, trained, "old")
    for name, value in trained.named_parameters():
        parts = [shard.get_parameter(name) for shard in shards]
        whole = torch.cat(parts) if getattr(parts[0], "is_expert", False) else parts[0]
        assert whole.equal(value), name


def test_positions_of_another_image_size_are_resampled() -> None:
    trained, model = built(OLD, seed=1), built(OLD, seed=2, side=64)
    assert start_from_trained(model, trained, "old").grids == (4, 8)
    theirs, ours = trained.backbone.position.T.view(-1, 4, 4), model.backbone.position.T.view(-1, 8, 8)
    torch.testing.assert_close(ours.mean((1, 2)), theirs.mean((1, 2)), rtol=0.2, atol=0.01)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depth": 3}, r"old has model\.depth 2, the new model 3: set model\.depth=2"),
        ({"placement": "mlp"}, r"set model\.placement=every"),
        ({"head_width": 8}, r"set model\.head_width=16"),
        ({"renormalize_gates": True}, r"set model\.renormalize_gates=False"),
    ],
)
def test_another_model_is_refused_with_what_to_set(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start_from_trained(built(OLD, seed=2, **sizes), built(OLD, seed=1), "old")
