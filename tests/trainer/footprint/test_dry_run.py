"""The dry run: the worst step is taken and measured, leaves nothing behind, and is refused where it cannot fit."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from cluster.env import RankEnv
from configs.errors import UserError
from model.cost import count_expert_parameters
from model.vit import expert_layers
from tests.ranks import run_ranks
from tests.trainer.loop_run import NAMES, loop_config, make_shards
from tests.trainer.worlds import world_of_one
from trainer.assembly import Assembly, assemble
from trainer.cli.main import app
from trainer.engine import init_distributed
from trainer.footprint.dry_run import DryRun, all_tokens_to_the_same_experts, dry_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry_run")
    make_shards(folder)
    return folder


SIZES = ("train.images_per_step=8", "train.micro_batch=2")


def dry_run_on(rank: int, world: int, folder: Path) -> DryRun:
    config = loop_config(folder, f"parallel.ep_size={world}", *SIZES)
    return dry_run(config, RankEnv(rank=rank, world=world, local_rank=rank))


def bytes_of_dry_runs(rank: int, world: int, folder: Path) -> list[int]:
    """What experts in order send, then task-affine ones of which none or one is shadowed."""
    found = []
    for overrides in (("in_order", 1), ("task_affine", 0), ("task_affine", 1)):
        placement = (f"parallel.expert_placement={overrides[0]}", f"parallel.shadowed_experts={overrides[1]}")
        config = loop_config(folder, f"parallel.ep_size={world}", *SIZES, *placement)
        with mock.patch("trainer.footprint.dry_run.assemble", wraps=assemble) as built:
            parts: list[Assembly] = []
            built.side_effect = lambda *args, parts=parts: parts.append(assemble(*args)) or parts[0]
            dry_run(config, RankEnv(rank=rank, world=world, local_rank=rank))
        found.append(parts[0].traffic.sent_bytes)
    return found


def test_shadowed_experts_are_part_of_the_worst_step(shards: Path) -> None:
    model = loop_config(shards).model
    expert_bytes = 4 * sum(count_expert_parameters(model, layer.kind) for layer in expert_layers(model))
    in_order, none, one = torch.tensor(run_ranks(bytes_of_dry_runs, 2, shards)).sum(0).tolist()
    assert in_order == none
    passes = 2 * 8 // 2 // 2  # two steps of 8 images, 2 per rank and pass
    assert one - none == passes * 2 * expert_bytes, "to the other rank, and gradients back"


def test_ranks_agree_on_what_the_worst_step_took(shards: Path) -> None:
    found = run_ranks(dry_run_on, 2, shards)
    assert found[0] == found[1]
    assert found[0].step_seconds > 0
    assert found[0].pairs == 2 * len(NAMES)
    assert 0 < found[0].planned_bytes < found[0].peak_bytes < found[0].available_bytes
    assert not (shards / "run").exists()


def test_a_step_that_cannot_fit_is_refused_before_anything_is_built(shards: Path) -> None:
    config = loop_config(shards)
    with (
        world_of_one(),
        mock.patch("trainer.footprint.dry_run.available_bytes", return_value=2**20),
        mock.patch("trainer.footprint.dry_run.assemble") as built,
        pytest.raises(UserError, match=r"takes about .* GiB per rank, and 0\.00 GiB are available: lower train"),
    ):
        dry_run(config, RankEnv())
    built.assert_not_called()


def test_routing_is_forced_and_let_go(shards: Path) -> None:
    config = loop_config(shards)
    with world_of_one():
        init_distributed(RankEnv(), config.parallel)
        parts = assemble(config, RankEnv())
        images = torch.rand(2, 3, 32, 32)
        pairs = torch.tensor([0, 1]), torch.tensor([0, 3])
        with torch.no_grad():
            before = parts.model(images, *pairs).routing
            with all_tokens_to_the_same_experts(parts.model):
                forced = parts.model(images, *pairs).routing
            after = parts.model(images, *pairs).routing
        parts.engine.close()
    for free, worst, again in zip(before, forced, after, strict=True):
        counts = worst.counts_TE.sum(0)
        assert counts[:2].tolist() == [32, 32]
        assert counts[2:].sum() == 0
        assert torch.equal(free.counts_TE, again.counts_TE)


def test_the_command(shards: Path) -> None:
    loop_config(shards)
    with world_of_one():
        overrides = [f"run_dir={shards}/run", f"data.train={shards}/train", f"data.val={shards}/val"]
        done = CliRunner().invoke(app, ["train", str(shards / "recipe.yaml"), *overrides, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "worst step:" in done.output
    assert not (shards / "run").exists()
