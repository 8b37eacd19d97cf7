"""A run folder written by hand, as a finished run of two tasks leaves it, without checkpoint and shards."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from configs.load import dump_config
from configs.schema import RunConfig
from model.layer_routing import ExpertLayerInfo, LayerRouting
from model.routing_stats import RoutingLedger
from trainer.run_files import ConflictLayer, ConflictRecord
from trainer.squads.summary import SquadLayer, SquadScore, SquadSummary

TASKS = ("depth_zbuffer", "normal")
LAYERS = (
    ExpertLayerInfo(name="blocks.0.attention", kind="attention", block=0, num_experts=4, top_k=2, sees_task=True),
    ExpertLayerInfo(name="blocks.1.mlp", kind="mlp", block=1, num_experts=4, top_k=2, sees_task=True),
)
STEPS = 40


def run_config(run_dir: Path, **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"run_dir": str(run_dir), "tasks": TASKS, "train": {"steps": STEPS, "images_per_step": 8}, "data": data}
    )


def step_line(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 3 / step,
        "task_loss": {"depth_zbuffer": 1 / step, "normal": 2 / step},
        "matching_loss": -0.001,
        "mutual_information": {layer.name: 0.01 * step for layer in LAYERS},
        "learning_rate": 1e-3,
        "gradient_norm": None,
        "images": 8 * step,
        "pairs": {"depth_zbuffer": 8, "normal": 8},
        "step_seconds": 0.25,
        "data_wait_seconds": 0.0,
        "bad_steps": 0,
        "time": 1.7e9 + step,
    }


def write_lines_of_grown_batch(run_dir: Path) -> None:
    """Let the run have gone on from half of its steps, 8 images each, with steps of 32: 800 images in all."""
    lines = [step_line(step) for step in range(1, STEPS + 1)]
    for line in lines[STEPS // 2 :]:
        line["images"] += 24 * (line["step"] - STEPS // 2)
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    config = run_config(run_dir)
    train = config.train.model_copy(update={"images_per_step": 32})
    (run_dir / "config.yaml").write_text(dump_config(config.model_copy(update={"train": train})))


def score(metric: str, value: float | None, constant: float | None, beats: bool | None) -> dict[str, Any]:
    return {
        "metric": metric,
        "higher_is_better": False,
        "value": value,
        "constant": constant,
        "beats_constant": beats,
        "all": {metric: {"value": value, "constant": constant}},
    }


def ledger() -> RoutingLedger:
    """Depth's tokens use experts 0 and 1 only, those of normals 2 and 3."""
    filled = RoutingLedger(LAYERS, TASKS)
    counts = torch.tensor([[10, 10, 0, 0], [0, 0, 10, 10]])
    zero = torch.zeros(())
    for info in LAYERS:
        routing = LayerRouting(
            info=info,
            prob_sum_TE=counts.float() / 2,
            tokens_T=torch.tensor([10.0, 10.0]),
            counts_TE=counts,
            z_sum=zero,
            entropy_sum_T=torch.full((2,), 10 * math.log(2)),
        )
        filled.update([routing])
    return filled


def conflict_record() -> ConflictRecord:
    """Depth and normals conflict in shared weights, and use experts of their own."""
    layers = [
        ConflictLayer(
            block=block, part="mlp", kind=kind, sees_task=True, weights=1000, norms=(1.0, 2.0), cosine=((1, x), (x, 1))
        )
        for block in (0, 1)
        for kind, x in (("experts", 0.0), ("shared", -0.25))
    ]
    return ConflictRecord(step=STEPS, images=32, tasks=TASKS, layers=tuple(layers))


def write_run_folder(run_dir: Path) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump_config(run_config(run_dir, val=str(run_dir / "no-shards"))))
    lines = [json.dumps(step_line(step)) for step in range(1, STEPS + 1)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for folder in ("evaluation", "routing"):
        (run_dir / folder).mkdir()
    tasks = {"depth_zbuffer": score("abs_rel", 0.2, 0.5, True), "normal": score("mean_angle_deg", 33.0, 30.0, False)}
    evaluation = {"step": STEPS, "split": "val", "images": 16, "tasks": tasks}
    (run_dir / "evaluation" / f"step_{STEPS:08d}_val.json").write_text(json.dumps(evaluation))
    (run_dir / "routing" / f"step_{STEPS:08d}.json").write_text(json.dumps(ledger().to_json()))
    return run_dir


def squad_summary() -> SquadSummary:
    layers = tuple(
        SquadLayer(name=layer.name, kind=layer.kind, num_experts=4, kept=(2, 3), unaffected_share=0.99)
        for layer in LAYERS
    )
    score = SquadScore(
        task="normal",
        metric="mean_angle_deg",
        higher_is_better=False,
        before=30.0,
        after=30.15,
        unaffected_tokens=0.98,
        unaffected_images=0.75,
    )
    return SquadSummary(
        step=STEPS,
        threshold=0.01,
        routing="ledger",
        image_size=64,
        images=16,
        parameters_before=2_000_000,
        parameters_after=900_000,
        macs_before=50_000_000,
        macs_after=50_000_000,
        scores=(score,),
        layers=layers,
    )
