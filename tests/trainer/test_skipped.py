"""Damaged samples are left out of training as if their pairs had never been, on any number of ranks, up to a limit."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cluster.env import RankEnv
from configs.errors import UserError
from data_pipeline.cursor import Cursor
from data_pipeline.index import ShardIndex
from data_pipeline.loader import TrainLoader
from data_pipeline.planning.plan import Slot
from data_pipeline.reading import read_batch
from data_pipeline.skips import Skip, SkipCounts
from data_pipeline.targets import Prepared, prepare_batch
from data_pipeline.tolerant import read_whole_members
from model.matching import Matching
from model.mod_squad import ModSquad
from tests.ranks import run_ranks
from tests.trainer.loop_run import SIDE, SPECS, loop_config, make_shards
from trainer.engine import close_distributed
from trainer.journal import SKIPPED_FILE
from trainer.loop import Trainer
from trainer.objective import Objective
from trainer.skipped import SkipRecorder

TOLERANT = "data.max_bad_samples=5"


@pytest.fixture
def alone() -> Iterator[RankEnv]:
    yield RankEnv()
    close_distributed()


def damage(folder: Path, sample: int, member: str) -> str:
    """Overwrite a member of a training sample behind its first 60 bytes; return the sample's key."""
    index = ShardIndex.load(folder / "train")
    good = index.read(sample, member)
    path = folder / "train" / index.shards[int(index.shard_of[sample])].name
    data = path.read_bytes()
    start = data.index(f"{index.keys[sample]}.{member}.".encode()) + 512
    assert data[start : start + len(good)] == good
    path.write_bytes(data[:start] + good[:60].ljust(len(good), b"\xff") + data[start + len(good) :])
    return index.keys[sample]


class Notes:
    """A listener that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_start(self, step: int, steps: int) -> None: ...

    def on_step(self, step: int, metrics: Any) -> None: ...

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_end(self) -> None: ...


SLOTS = [Slot(sample, (0, 1, 2, 3) if sample % 6 != 5 else (0, 1, 2), 0) for sample in range(6)]
PAIRS = np.array([6, 6, 6, 5])


@pytest.mark.parametrize(
    ("member", "left", "reason"),
    [
        ("normal", [s if s.sample != 2 else replace(s, tasks=(0, 2, 3)) for s in SLOTS], "damaged"),
        ("rgb", [s for s in SLOTS if s.sample != 2], "damaged"),
        ("mask_valid", [s for s in SLOTS if s.sample != 2], "damaged"),
    ],
)
def test_a_batch_is_that_without_the_damaged_pairs(tmp_path: Path, member: str, left: list[Slot], reason: str) -> None:
    make_shards(tmp_path)
    whole = ShardIndex.load(tmp_path / "train")
    expected = read_batch(whole, SPECS, left, PAIRS, None)
    key = damage(tmp_path, 2, member)
    found = read_whole_members(ShardIndex.load(tmp_path / "train"), SPECS, SLOTS, PAIRS, None)
    assert [(skip.key, skip.shard, skip.member, skip.reason) for skip in found.left_out] == [
        (key, "000.tar", member, reason)
    ]
    assert f"000.tar, sample {key}, member {member} is damaged" in found.left_out[0].message
    for name, value in vars(replace(found, left_out=())).items():
        assert_same(value, getattr(expected, name))
    results = [loss_and_gradients(tmp_path, prepare_batch(batch, SPECS, SIDE)) for batch in (found, expected)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    else:
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other


def loss_and_gradients(folder: Path, prepared: Prepared) -> list[torch.Tensor]:
    config = loop_config(folder)
    model = ModSquad(config.model, SPECS, SIDE, seed=1)
    objective = Objective(model, Matching(config.matching, model.expert_layers, len(SPECS)), config, SPECS)
    loss, _ = objective(prepared, 1.0)
    loss.backward()
    return [loss.detach(), *(p.grad for p in objective.parameters() if p.grad is not None)]


def test_the_loss_is_still_divided_by_the_planned_pairs(tmp_path: Path) -> None:
    """Each remaining pair weighs what it did; so ranks that saw no damage need not know of it."""
    make_shards(tmp_path)
    index = ShardIndex.load(tmp_path / "train")
    whole = read_batch(index, SPECS, SLOTS, PAIRS, None)
    damage(tmp_path, 2, "normal")
    left = read_whole_members(ShardIndex.load(tmp_path / "train"), SPECS, SLOTS, PAIRS, None)
    assert torch.equal(left.global_pairs, whole.global_pairs)
    assert len(left.labels["normal"]) == len(whole.labels["normal"]) - 1


def test_a_batch_may_lose_all_its_images(tmp_path: Path) -> None:
    make_shards(tmp_path)
    damage(tmp_path, 2, "rgb")
    batch = read_whole_members(ShardIndex.load(tmp_path / "train"), SPECS, SLOTS[2:3], PAIRS, None)
    assert batch.images.shape == (0, 3, SIDE, SIDE)
    loss, *gradients = loss_and_gradients(tmp_path, prepare_batch(batch, SPECS, SIDE))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_shard_that_is_gone_is_no_damaged_sample(tmp_path: Path) -> None:
    make_shards(tmp_path)
    index = ShardIndex.load(tmp_path / "train")
    (tmp_path / "train" / "000.tar").unlink()
    with pytest.raises(UserError, match=r"000.tar.*(opened|missing)"):
        read_whole_members(index, SPECS, SLOTS, PAIRS, None)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_without_damaged_samples(tmp_path: Path, alone: RankEnv, workers: int) -> None:
    make_shards(tmp_path)
    keys = [damage(tmp_path, 3, "rgb"), damage(tmp_path, 9, "normal")]
    listener = Notes()
    config = loop_config(tmp_path, "train.steps=12", TOLERANT, f"data.workers={workers}")
    Trainer(config, alone, listener).fit()
    lines = read_lines(tmp_path / "run" / SKIPPED_FILE)
    assert sorted((line["key"], line["shard"], line["member"], line["reason"]) for line in lines) == [
        (keys[0], "000.tar", "rgb", "damaged"),
        (keys[1], "001.tar", "normal", "damaged"),
    ]
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    # 12 steps of 4 images go over 22 samples at least twice; each time counts.
    assert all(2 <= last["skipped"][shard]["damaged"] <= 3 for shard in ("000.tar", "001.tar"))
    assert last["bad_steps"] == 0
    assert sum("is damaged" in note for note in listener.notes) == 2
    assert "2 training samples in 2 shards" in listener.notes[-1]


def test_one_sample_too_many_stops_the_run(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path)
    for sample in (1, 6, 12):
        damage(tmp_path, sample, "normal")
    with pytest.raises(UserError, match=r"^3 training samples are damaged, more than data.max_bad_samples 2") as caught:
        Trainer(loop_config(tmp_path, "train.steps=12", "data.max_bad_samples=2"), alone, Notes()).fit()
    assert "\n" not in str(caught.value)
    assert len(read_lines(tmp_path / "run" / SKIPPED_FILE)) == 3


def test_without_the_key_the_first_damage_stops(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path)
    damage(tmp_path, 3, "rgb")
    with pytest.raises(UserError, match=r"member rgb is damaged"):
        Trainer(loop_config(tmp_path, "train.steps=12"), alone, Notes()).fit()
    assert not (tmp_path / "run" / SKIPPED_FILE).exists()


def test_evaluation_leaves_nothing_out(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path)
    (tmp_path / "train").rename(tmp_path / "kept")
    (tmp_path / "val").rename(tmp_path / "train")
    damage(tmp_path, 1, "normal")
    (tmp_path / "train").rename(tmp_path / "val")
    (tmp_path / "kept").rename(tmp_path / "train")
    with pytest.raises(UserError, match=r"val.*member normal is damaged"):
        Trainer(loop_config(tmp_path, TOLERANT), alone, Notes()).fit()


def test_a_resumed_run_counts_on(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path)
    for sample in (1, 6, 12):
        damage(tmp_path, sample, "normal")
    Trainer(loop_config(tmp_path, "train.steps=6", TOLERANT), alone, Notes()).fit()
    before = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["skipped"]
    close_distributed()
    again = Trainer(loop_config(tmp_path, "train.steps=12", TOLERANT), alone, Notes())
    assert again.state.skips.samples == 3
    assert again.state.skips.by_shard() == before
    again.fit()
    assert len(read_lines(tmp_path / "run" / SKIPPED_FILE)) == 3, "what was met again is not listed again"


def train_on_two_ranks(rank: int, world: int, folder: Path, most: int) -> tuple[Any, ...]:
    """Return how it ended, the parameters' sum, and what was counted."""
    env = RankEnv(rank=rank, world=world, local_rank=rank)
    listener = Notes()
    config = loop_config(folder, "train.steps=4", "train.images_per_step=4", f"data.max_bad_samples={most}")
    trainer = Trainer(config, env, listener)
    try:
        trainer.fit()
        end = "done"
    except UserError as error:
        end = str(error)
    weights = sum(p.double().sum().item() for p in trainer.parts.model.parameters())
    return end, weights, trainer.state.skips.by_shard(), sum(trainer._skips.on_rank.values())


def first_samples(folder: Path) -> list[int]:
    config = loop_config(folder)
    index = ShardIndex.load(folder / "train")
    cursor = Cursor.start(index, config.seed)
    options = {"micro_batch": 4, "rank": 0, "world": 1, "seed": config.seed, "cursor": cursor, "steps": 2}
    loader = TrainLoader(index, config.data, SPECS, images_per_step=4, **options)  # type: ignore[arg-type]
    return [index.keys.index(key) for batch in loader for key in batch.keys]


def test_damage_on_one_rank_of_two(tmp_path: Path) -> None:
    """Nobody hangs, both ranks agree, and the weights are those of one process."""
    make_shards(tmp_path)
    damage(tmp_path, first_samples(tmp_path)[0], "normal")
    (one, weights, counts, _), (other, *rest) = run_ranks(train_on_two_ranks, 2, tmp_path, 5)
    assert (one, other) == ("done", "done")
    assert rest[:2] == [weights, counts]
    assert sum(sum(reasons.values()) for reasons in counts.values()) == 1
    (tmp_path / "run").rename(tmp_path / "two")
    ((single, expected, *_),) = run_ranks(train_on_two_ranks, 1, tmp_path, 5)
    assert single == "done"
    assert weights == pytest.approx(expected, rel=1e-5)
    lines = [read_lines(tmp_path / run / SKIPPED_FILE) for run in ("run", "two")]
    assert lines[0] == lines[1]
    losses = [[line["loss"] for line in read_lines(tmp_path / run / "metrics.jsonl")] for run in ("run", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_too_much_damage_over_both_ranks_stops_both(tmp_path: Path) -> None:
    make_shards(tmp_path)
    for sample in first_samples(tmp_path)[:4]:
        damage(tmp_path, sample, "normal")
    (one, *_, mine), (other, *_, theirs) = run_ranks(train_on_two_ranks, 2, tmp_path, 3)
    assert one == other
    assert one.startswith("4 training samples are damaged, more than data.max_bad_samples 3")
    assert mine > 0
    assert theirs > 0
    assert mine + theirs == 4


def test_counts_survive_their_dictionary() -> None:
    counts = SkipCounts()
    first = Skip("k", "a.tar", "rgb", "damaged", "it is")
    assert counts.add([first, first, replace(first, member="normal")]) == [first, replace(first, member="normal")]
    again = SkipCounts.from_dict(json.loads(json.dumps(counts.to_dict())))
    assert again.by_shard() == counts.by_shard() == {"a.tar": {"damaged": 3}}
    assert again.samples == counts.samples == 1
    assert again.add([first]) == []


def test_nothing_is_agreed_where_nothing_may_be_left_out(tmp_path: Path) -> None:
    recorder = SkipRecorder(tmp_path, 0, dist.group.WORLD)  # type: ignore[arg-type]  # there is none here
    assert recorder.record(SkipCounts(), [], 1) == []


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
