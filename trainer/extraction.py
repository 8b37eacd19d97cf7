"""`modsquad extract`: cut one task's squad out of a run and measure it beside the whole model.

Both models see the same validation images. What was measured is written with the squad (squad.json), so that nobody
has to take its quality on trust.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import RunConfig
from configs.tasks import TaskSpec
from data_pipeline.index import ShardIndex
from data_pipeline.loader import EvaluationLoader
from data_pipeline.targets import Prepared, prepare_batch
from model.extract import Unaffected, extract_squad, select_experts, squad_cost, unaffected_share
from model.mod_squad import ModelOutput, ModSquad
from model.routing_stats import RoutingLedger
from model.vit import Kept
from trainer.evaluate import Forward, evaluate, squad_forward
from trainer.export import SQUAD_FILE, available_device, load_run_model, read_squad_json, save_squad
from trainer.run_files import read_latest_ledger
from trainer.squad_summary import SquadLayer, SquadSummary

DEFAULT_THRESHOLD = 0.01
"""An expert that fewer than 1 % of the task's tokens choose leaves; a token that loses one to this rule takes its next
best. Measured on the squads of `modsquad quickstart` (depth_zbuffer, normal): no metric changed by more than 0.005 %,
99.6 and 98.6 % of the tokens were unaffected. Other models may differ: each extraction reports its own change."""


def extract_task(
    run_dir: Path, task: str, out: Path, *, threshold: float = DEFAULT_THRESHOLD, images: int | None = None
) -> SquadSummary:
    """Write the squad of `task` to the folder `out` and return what was measured.

    Args:
        run_dir: a run with a checkpoint and an evaluation of the same step.
        task: one of the run's tasks.
        out: folder that receives squad.safetensors and squad.json.
        threshold: an expert stays if at least this share of the task's tokens chose it in the evaluation, and in any
            case the K most used; 0 keeps all experts.
        images: validation images to measure on, from the start of the index; None: `evaluate.images` of the run.

    Raises:
        UserError: no such task, no checkpoint, no evaluation of its step, missing shards, no image with the
            task's label, or `out` cannot be written.
    """
    device = available_device()
    model, config, step = load_run_model(run_dir, device)
    spec = _find_task(config, task)
    ledger = _ledger_of(run_dir, step)
    kept = select_experts(ledger, task, model.expert_layers, threshold)
    squad = extract_squad(model, task, kept).to(device)

    index = ShardIndex.load(Path(config.data.val))
    limit = config.evaluate.images if images is None else images
    before, _ = _score(_one_task_forward(model, task), index, config, spec, limit, device)
    after, count = _score(squad_forward(squad, task), index, config, spec, limit, device)
    cost = squad_cost(model, squad)
    images_here = (batch.to(device) for batch in _labelled_images(index, config, spec, limit))
    unaffected = unaffected_share(model, task, kept, images_here)
    summary = SquadSummary(
        task=task,
        step=step,
        threshold=threshold,
        image_size=config.data.image_size,
        images=count,
        metric=spec.metric,
        higher_is_better=spec.higher_is_better,
        value_before=before,
        value_after=after,
        parameters_before=cost.parameters_before,
        parameters_after=cost.parameters_after,
        macs_before=cost.macs_before,
        macs_after=cost.macs_after,
        unaffected_tokens=unaffected.tokens,
        unaffected_images=unaffected.images,
        layers=_layers(model, kept, unaffected),
    )
    save_squad(out, squad, summary)
    return summary


def read_summary(folder: Path, *, step: int | None = None) -> SquadSummary | None:
    """Return what was measured when the squad in `folder` was extracted; None without a squad there.

    Args:
        folder: folder of a squad.
        step: only a squad of the checkpoint of this step counts; None: any.

    Raises:
        UserError: squad.json is damaged.
    """
    if not (folder / SQUAD_FILE).is_file():
        return None
    summary = SquadSummary.from_values(read_squad_json(folder), str(folder / SQUAD_FILE))
    return summary if step is None or summary.step == step else None


def _find_task(config: RunConfig, task: str) -> TaskSpec:
    specs = {spec.name: spec for spec in config.task_specs}
    if task not in specs:
        raise UserError(f"the run was not trained on task '{task}'; its tasks: {', '.join(specs)}")
    return specs[task]


def _ledger_of(run_dir: Path, step: int) -> RoutingLedger:
    """Return the latest ledger, which must be of the weights that leave."""
    found = read_latest_ledger(run_dir)
    if found is None or found[0] != step:
        held = "there is none" if found is None else f"the latest is of step {found[0]}"
        raise UserError(
            f"extraction needs the routing ledger of the checkpoint's step {step}, {held}: run `modsquad evaluate "
            f"{run_dir}` first"
        )
    return found[1]


def _score(
    forward: Forward, index: ShardIndex, config: RunConfig, spec: TaskSpec, limit: int | None, device: torch.device
) -> tuple[float, int]:
    """Return the task's metric (NaN where nothing could be judged) and the number of images."""
    evaluation = evaluate(forward, index, config, [spec], constants={}, device=device, limit=limit)
    value = evaluation.scores[spec.name][spec.metric].value
    return math.nan if value is None else value, evaluation.images


def _one_task_forward(model: ModSquad, task: str) -> Forward:
    """Return the whole model's `Forward` on batches that hold this task's pairs only."""
    task_id = [spec.name for spec in model.tasks].index(task)

    def forward(prepared: Prepared) -> Mapping[str, Tensor]:
        output: ModelOutput = model(prepared.images, prepared.pair_image, torch.full_like(prepared.pair_task, task_id))
        return output.predictions

    return forward


def _labelled_images(index: ShardIndex, config: RunConfig, spec: TaskSpec, limit: int | None) -> Iterator[Tensor]:
    """Yield the images that have the task's label, (b, 3, S, S) in [-1, 1]: those that the metric is about.

    Raises:
        UserError: there is none.
    """
    found = 0
    loader = EvaluationLoader(
        index,
        [spec],
        batch_size=config.evaluate.batch_size,
        rank=0,
        world=1,
        limit=limit,
        workers=config.data.workers,
    )
    try:
        for batch in loader:
            prepared = prepare_batch(batch, [spec], config.data.image_size)
            found += len(prepared.pair_image)
            yield prepared.images[prepared.pair_image]
    finally:
        loader.close()
    if not found:
        raise UserError(f"no validation image to measure on has a label of '{spec.name}': measure on more images")


def _layers(model: ModSquad, kept: Kept, unaffected: Unaffected) -> tuple[SquadLayer, ...]:
    return tuple(
        SquadLayer(
            name=layer.name,
            kind=layer.kind,
            num_experts=layer.num_experts,
            kept=tuple(kept[layer.name]),
            unaffected_share=unaffected.layers[layer.name],
        )
        for layer in model.expert_layers
    )
