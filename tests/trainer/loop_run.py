"""A run small enough for unit tests of the loop: 32-pixel samples, four tasks, a model of two blocks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize, one_hot

from configs.atomic import write_text_atomically
from configs.load import load_config
from configs.schema import RunConfig
from configs.tasks import TASKS
from data_pipeline.sample import Sample
from data_pipeline.shards import ShardWriter, write_index
from data_pipeline.targets import Prepared, Target

NAMES = ("depth_euclidean", "normal", "keypoints2d", "class_scene")
SPECS = tuple(TASKS[name] for name in NAMES)
SIDE = 32

_CONFIG = """
seed: 3
tasks: [depth_euclidean, normal, keypoints2d, class_scene]
model: {width: 32, depth: 2, heads: 2, patch_size: 8, attention_experts: 4, attention_top_k: 2, mlp_experts: 4,
        mlp_top_k: 2, placement: every}
data: {image_size: 32, workers: 0}
optim: {lr: 0.003, warmup_steps: 2}
train: {steps: 6, images_per_step: 4, log_every_steps: 1}
parallel: {timeout_seconds: 60}
checkpoint: {every_steps: 3}
"""


def loop_config(folder: Path, *overrides: str) -> RunConfig:
    """Return a configuration of a run in `folder`/run, on the shards that `make_shards` puts into `folder`."""
    recipe = folder / "recipe.yaml"
    write_text_atomically(recipe, _CONFIG)  # every rank of a test does so
    places = [f"run_dir={folder}/run", f"data.train={folder}/train", f"data.val={folder}/val"]
    return load_config(recipe, [*places, *overrides])


def make_shards(folder: Path, train: int = 22, val: int = 7) -> None:
    """Write shards of at most 8 samples to `folder`/train and `folder`/val; some samples lack the label of a scene."""
    for split, count in (("train", train), ("val", val)):
        path = folder / split
        path.mkdir(parents=True)
        entries = []
        for shard, first in enumerate(range(0, count, 8)):
            with ShardWriter(path / f"{shard:03d}.tar") as writer:
                for number in range(first, min(first + 8, count)):
                    writer.write(random_sample(f"{split}-{number:03d}", number))
            entries.append(writer.entry)
        write_index(path, entries)


def random_sample(key: str, number: int) -> Sample:
    """Return a picture whose labels follow from it."""
    rng = np.random.default_rng(number)
    rgb = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    labels: dict[str, Any] = {
        "depth_euclidean": rgb[..., 0].astype(np.uint16) * 16 + 200,
        "normal": np.stack([rgb[..., 1], 255 - rgb[..., 1], np.full_like(rgb[..., 0], 200)], axis=-1),
        "keypoints2d": rgb[..., 2].astype(np.uint16),
        "class_scene": np.eye(365, dtype=np.float32)[number % 5],
    }
    if number % 6 == 5:
        del labels["class_scene"]
    mask = np.full((SIDE, SIDE), 255, np.uint8)
    mask[: number % 4] = 0
    return Sample(key=key, rgb=rgb, labels=labels, mask_valid=mask)


def random_prepared(images: int, pairs_per_task: Sequence[int], seed: int = 0) -> Prepared:
    """Return a prepared batch of the four tasks, `pairs_per_task` pairs each, as the whole global batch."""
    generator = torch.Generator().manual_seed(seed)
    targets = {}
    for spec, pairs in zip(SPECS, pairs_per_task, strict=True):
        if spec.dense:
            values = torch.rand(pairs, spec.channels, SIDE, SIDE, generator=generator)
            mask = torch.rand(pairs, 1, SIDE, SIDE, generator=generator) < 0.8
        else:
            values = one_hot(torch.randint(5, (pairs,), generator=generator), spec.channels).float()
            mask = torch.ones(pairs, 1, dtype=torch.bool)
        targets[spec.name] = Target(normalize(values, dim=1) if spec.loss == "cosine" else values, mask)
    counts = torch.tensor(list(pairs_per_task))
    return Prepared(
        images=torch.rand(images, 3, SIDE, SIDE, generator=generator) * 2 - 1,
        targets=targets,
        pair_image=torch.cat([torch.arange(pairs) % max(images, 1) for pairs in pairs_per_task]),
        pair_task=torch.arange(len(SPECS)).repeat_interleave(counts),
        global_pairs=counts,
        turns=torch.tensor([(number, 0) for number in range(images)], dtype=torch.int64).view(-1, 2),
        keys=tuple(f"sample-{number}" for number in range(images)),
    )


def slice_pairs(prepared: Prepared, images: slice) -> Prepared:
    """Return the part of a batch that a rank with only `images` sees; `global_pairs` stays."""
    chosen = torch.arange(len(prepared.images))[images]
    kept = torch.isin(prepared.pair_image, chosen)
    targets = {}
    for task, spec in enumerate(SPECS):
        rows = kept[prepared.pair_task == task]
        target = prepared.targets[spec.name]
        targets[spec.name] = Target(target.values[rows], target.mask[rows])
    return Prepared(
        images=prepared.images[images],
        targets=targets,
        pair_image=prepared.pair_image[kept] - int(chosen[0]),
        pair_task=prepared.pair_task[kept],
        global_pairs=prepared.global_pairs,
        turns=prepared.turns[images],
        keys=prepared.keys[images],
    )
