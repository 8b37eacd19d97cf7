"""A tiny model and tiny shards: 16 pixels, two blocks, a dense task with gaps, one of unit vectors, one of classes."""

from pathlib import Path

import numpy as np

from configs.load import dump_config
from configs.schema import RunConfig
from data_pipeline.sample import Sample
from data_pipeline.shards import ShardWriter, write_index
from model.mod_squad import ModSquad

SIDE = 16
TASKS = ("class_scene", "depth_zbuffer", "normal")
UNLABELLED = 1  # the sample without a class


def tiny_config(run_dir: Path, ep_size: int = 1) -> RunConfig:
    model = {
        "width": 16,
        "depth": 2,
        "heads": 2,
        "attention_experts": 4,
        "attention_top_k": 2,
        "mlp_experts": 4,
        "mlp_top_k": 2,
    }
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "tasks": TASKS,
            "model": model,
            "data": {"image_size": SIDE, "val": str(run_dir / "val"), "train": str(run_dir / "val"), "workers": 0},
            "train": {"steps": 7, "task_weighting": "uncertainty"},
            "optim": {"warmup_steps": 1},
            "parallel": {"ep_size": ep_size},
            "evaluate": {"batch_size": 2},
        }
    )


def tiny_model(config: RunConfig, seed: int = 3) -> ModSquad:
    return ModSquad(config.model, config.task_specs, config.data.image_size, seed=seed).eval()


def write_shards(folder: Path, samples: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    with ShardWriter(folder / "shard_000000.tar") as writer:
        for index in range(samples):
            labels = {
                "class_scene": random.dirichlet(np.ones(365)).astype(np.float32),
                "depth_zbuffer": random.integers(512, 4096, (SIDE, SIDE)).astype(np.uint16),
                "normal": random.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8),
            }
            if index == UNLABELLED:
                del labels["class_scene"]
            rgb = random.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
            writer.write(Sample(key=f"sample_{index:06d}", rgb=rgb, labels=labels))
    write_index(folder, [writer.entry])


def save_tiny_run(rank: int, world: int, folder: str) -> None:
    """Write config.yaml and the checkpoint of step 7 of an untrained model with sharded experts; on every rank."""
    from cluster.env import RankEnv
    from cluster.groups import Layout
    from model.matching import Matching
    from trainer.checkpoint.saving import save
    from trainer.engine import Engine, expert_group, init_distributed
    from trainer.objective import Objective

    run_dir = Path(folder)
    config = tiny_config(run_dir, ep_size=world)
    layout = Layout(world, world)
    init_distributed(RankEnv(rank=rank, world=world, local_rank=rank), config.parallel)
    model = ModSquad(config.model, config.task_specs, SIDE, seed=3, group=expert_group(layout))
    matching = Matching(config.matching, model.expert_layers, len(config.task_specs))
    objective = Objective(model, matching, config, config.task_specs)
    engine = Engine(objective, config, layout, accumulation=1, micro_batch=4)
    save(run_dir, engine, step=7, state={}, keep_last=1)
    if rank == 0:
        (run_dir / "config.yaml").write_text(dump_config(config))
    engine.close()
