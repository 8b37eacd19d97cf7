"""Real routing for the benchmark of communication: which experts every token of some images chose, task by task.

It comes from a run that the user names, or from a small model that is trained on rooms for the purpose; the images are
training images, and how tasks use experts is told by the run's ledger, which has counted validation images.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.local import run_ranks
from configs.errors import UserError
from configs.load import make_override
from configs.schema import ModelConfig
from configs.tasks import resolve_tasks
from data_pipeline.loader import EvaluationLoader
from data_pipeline.pack import pack
from data_pipeline.rooms.source import RoomsSource
from data_pipeline.run_shards import open_shards
from data_pipeline.targets import prepare_batch
from model.layer_routing import ExpertLayerInfo
from model.mod_squad import ModSquad
from model.routing_record import RoutingRecord
from model.routing_stats import RoutingLedger
from trainer.run_files import read_latest_ledger
from trainer.squads.export import load_run_model

IMAGES = 32
"""Images of the global batch that is replayed."""
TRAINING = {
    "train.steps": 240,
    "model.attention_experts": 16,
    "model.attention_top_k": 4,
    "model.mlp_experts": 16,
    "model.mlp_top_k": 4,
}
"""How the recipe baselines/mod_squad is changed: fewer steps, and 4 of 16 experts, so that 16 ranks can share them."""
ROOMS, HELD_OUT, SIDE = 600, 32, 64


@dataclass(frozen=True, kw_only=True)
class RecordedRouting:
    """The routes of one global batch.

    Attributes:
        config: the model's sizes.
        layers: its expert layers that see the task.
        pairs: (P, 2) int64, image and task.
        choices: layer name -> (P, N, K) int64, the experts of every token.
        ledger: how tasks used experts on other images.
        source: for the reader: where it comes from.
    """

    config: ModelConfig
    layers: tuple[ExpertLayerInfo, ...]
    pairs: NDArray[np.int64]
    choices: dict[str, Tensor]
    ledger: RoutingLedger
    source: str


def routing_of_run(run_dir: Path) -> RecordedRouting:
    """Record the routing of a run's latest checkpoint.

    Raises:
        UserError: no run, no checkpoint, no evaluation or no shards.
    """
    model, config, step = load_run_model(run_dir)
    if (found := read_latest_ledger(run_dir)) is None:
        raise UserError(f"{run_dir} has no routing ledger: evaluate the run first (modsquad evaluate {run_dir})")
    record = RoutingRecord(model.eval())
    index = open_shards(config, "train")
    loader = EvaluationLoader(
        index, model.tasks, batch_size=config.evaluate.batch_size, rank=0, world=1, limit=IMAGES, workers=0
    )
    with torch.inference_mode():
        for batch in loader:
            prepared = prepare_batch(batch, model.tasks, model.image_size)
            record.run(prepared.images, prepared.pair_image, prepared.pair_task)
    loader.close()
    return _recorded(record, found[1], f"step {step} of {run_dir}")


def routing_of_rooms() -> RecordedRouting:
    """Train a small model on rooms in a temporary folder, about four minutes on one core, and record its routing."""
    with tempfile.TemporaryDirectory(prefix="modsquad_bench_") as name:
        folder = Path(name)
        for split, rooms, seed in (("train", ROOMS, 0), ("val", HELD_OUT, 1)):
            pack(RoomsSource(images=rooms, size=SIDE, seed=seed), folder / split)
        data = {"run_dir": folder / "run", "data.train": folder / "train", "data.val": folder / "val"}
        overrides = [make_override(key, value) for key, value in {**data, **TRAINING}.items()]
        command = [sys.executable, "-m", "trainer.cli", "train", "baselines/mod_squad", *overrides]
        if status := run_ranks(command, 1, folder / "logs"):
            raise UserError(f"the training for the benchmark ended with status {status}: see its message above")
        recorded = routing_of_run(folder / "run")
    steps = TRAINING["train.steps"]
    return RecordedRouting(**{**vars(recorded), "source": f"{steps} steps on {ROOMS} rooms of {SIDE} px"})


def routing_of_new_model(image_size: int) -> RecordedRouting:
    """Record an untrained model on random images, for tests."""
    tasks = resolve_tasks("taskonomy")
    sizes = {key.removeprefix("model."): value for key, value in TRAINING.items() if key.startswith("model.")}
    config = ModelConfig.model_validate({"preset": "tiny", **sizes})
    model = ModSquad(config, tasks, image_size).eval()
    record, ledger = RoutingRecord(model), RoutingLedger(model.expert_layers, [spec.name for spec in tasks])
    images, T = 16, len(tasks)
    pixels = torch.rand(images, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        output = record.run(pixels, torch.arange(images).repeat(T), torch.arange(T).repeat_interleave(images))
    ledger.update(output.routing)
    return _recorded(record, ledger, "an untrained model")


def _recorded(record: RoutingRecord, ledger: RoutingLedger, source: str) -> RecordedRouting:
    layers = tuple(layer for layer in record.model.expert_layers if layer.sees_task)
    if not layers:
        raise UserError(f"{source} has no expert layer that sees the task: nothing depends on where tasks live")
    return RecordedRouting(
        config=record.model.config,
        layers=layers,
        pairs=record.pairs.numpy(),
        choices={layer.name: record.choices(layer.name) for layer in layers},
        ledger=ledger,
        source=source,
    )
