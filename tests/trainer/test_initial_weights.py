"""Runs that start from a file of dense weights: any container, only at the start, alike on all ranks."""

import argparse
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from cluster.env import RankEnv
from configs.errors import UserError
from configs.schema import RunConfig
from model.dense_weights import read_dense_vit, start_from_dense
from model.mod_squad import ModSquad
from tests.model.dense_vit import DEPTH, HEADS, PATCH, SIDE, WIDTH, trained
from tests.ranks import run_ranks
from tests.trainer.loop_run import loop_config, make_shards
from trainer.engine import close_distributed
from trainer.initial_weights import read_tensors, start_from_file
from trainer.loop import Trainer
from trainer.progress import PlainProgress
from trainer.squads.export import save_model

SIZES = (f"model.width={WIDTH}", f"model.depth={DEPTH}", f"model.heads={HEADS}", f"model.patch_size={PATCH}")


@pytest.fixture
def alone() -> Iterator[RankEnv]:
    """One rank in this process."""
    yield RankEnv()
    close_distributed()


def save_with(**beside: Any) -> Callable[[dict[str, Tensor], Path], None]:
    def save(weights: dict[str, Tensor], path: Path) -> None:
        content = {key: weights if value is None else value for key, value in beside.items()}
        torch.save(content or weights, path)

    return save


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("vit.safetensors", save_file),
        ("vit.pth", save_with()),
        ("vit.pth", save_with(model=None, epoch=3)),
        ("vit.pt", save_with(state_dict=None, optimizer={"lr": 0.1})),
        ("vit.bin", save_with(model_ema=None)),
    ],
    ids=["safetensors", "plain", "model", "state_dict", "model_ema"],
)
def test_every_container_is_read(name: str, save: Callable[[dict[str, Tensor], Path], None], tmp_path: Path) -> None:
    weights = dict(trained().state_dict())
    save(weights, tmp_path / name)
    torch.testing.assert_close(read_tensors(tmp_path / name), weights, rtol=0, atol=0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vit.pth", {"model": {"w": torch.ones(1)}, "args": argparse.Namespace()}, "holds objects besides tensors"),
        ("vit.pth", b"text", "cannot be read, fetch it again"),
        ("vit.pth", b"", "cannot be read, fetch it again"),
        ("vit.pth", {"epoch": 3}, "no state dict, neither directly nor under model, state_dict, model_ema"),
        ("vit.pth", [torch.ones(1)], "no state dict"),
        ("vit.safetensors", b"text", "cannot be read, fetch it again: Error while deserializing header"),
    ],
)
def test_files_that_cannot_be_read_are_named(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "vit.pth")
    save_file(trained().state_dict(), tmp_path / "vit.safetensors")
    for path in tmp_path.iterdir():
        cut(path)
        with pytest.raises(UserError, match=f"{path.name} cannot be read"):
            read_tensors(path)


def expected_start(config: RunConfig) -> dict[str, Tensor]:
    model = ModSquad(config.model, config.task_specs, config.data.image_size, seed=config.seed)
    start_from_dense(model, read_dense_vit(trained().state_dict(), "vit"), seed=config.seed)
    return model.state_dict()


def test_a_new_run_starts_from_the_file_and_a_resumed_one_does_without(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path, train=8, val=1)
    file = tmp_path / "vit.safetensors"
    save_file(trained().state_dict(), file)
    config = loop_config(tmp_path, *SIZES, f"train.init_from={file}", "train.steps=2", "checkpoint.every_steps=1")

    said = StringIO()
    trainer = Trainer(config, alone, PlainProgress(Console(file=said, width=400), 4))
    assert f"weights start from {file}; positions resampled from 4 x 4 to 8 x 8; not used: head" in said.getvalue()
    torch.testing.assert_close(trainer.parts.model.state_dict(), expected_start(config), rtol=0, atol=0)
    trainer.fit()
    learned = {name: value.clone() for name, value in trainer.parts.model.state_dict().items()}

    file.unlink()
    said = StringIO()
    resumed = Trainer(config, alone, PlainProgress(Console(file=said, width=400), 4))
    assert "weights start" not in said.getvalue()
    torch.testing.assert_close(resumed.parts.model.state_dict(), learned, rtol=0, atol=0)
    resumed.close()


def start_or_say(rank: int, world: int, folder: str) -> str:
    """Start from a file that only rank 0 has."""
    assert dist.group.WORLD is not None
    path = Path(folder) / "vit.pth" if rank == 0 else Path(folder) / "absent.pth"
    config = loop_config(Path(folder) / str(rank), *SIZES, f"train.init_from={path}")
    model = ModSquad(config.model, config.task_specs, SIDE)
    try:
        return start_from_file(model, config, dist.group.WORLD) or "nothing"
    except UserError as error:
        return str(error)


def test_a_file_that_one_rank_lacks_stops_all(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "vit.pth")
    said = run_ranks(start_or_say, 2, str(tmp_path))
    assert said == [f"train.init_from: {tmp_path / 'absent.pth'}: no such file"] * 2


def test_a_new_run_starts_from_an_exported_run_with_other_tasks(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path, train=8, val=1)
    file = tmp_path / "trained.safetensors"
    old = loop_config(tmp_path, "tasks=[normal,keypoints2d]", "seed=9")
    trained = ModSquad(old.model, old.task_specs, old.data.image_size, seed=9)
    save_model(file, trained, old, step=40)

    said = StringIO()
    config = loop_config(tmp_path, "tasks=[depth_euclidean,normal]", f"train.init_from={file}", "train.steps=2")
    trainer = Trainer(config, alone, PlainProgress(Console(file=said, width=400), 4))
    assert said.getvalue().splitlines()[:5] == [
        f"weights start from {file} (step 40)",
        "  shared by all tasks  taken",
        "  normal               routers, embedding and head taken",
        "  depth_euclidean      new",
        "  keypoints2d          not used",
    ]
    weights = trainer.parts.model.state_dict()
    for name in ("backbone.patch.weight", "heads.normal.linear.weight", "backbone.blocks.0.mlp.experts.w1"):
        assert weights[name].equal(trained.state_dict()[name])
    assert weights["backbone.task_embedding"][1].equal(trained.backbone.task_embedding[0])
    trainer.fit()


def test_a_squad_is_no_start(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path, train=8, val=1)
    file = tmp_path / "squad.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={"format": "modsquad.squad.2"})
    with pytest.raises(UserError, match=r"has format 'modsquad\.squad\.2', expected modsquad\.model"):
        Trainer(loop_config(tmp_path, f"train.init_from={file}"), alone)
