"""`modsquad extract`: cut the squad of one task or several out of a run and measure it beside the whole model.

Both see the same validation images. What was measured is written with the squad (squad.json), so that nobody has to
take its quality on trust. The whole model runs once: its metrics, and the routes of every token, serve all squads.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from configs.atomic import atomic_path
from configs.errors import UserError
from configs.schema import RunConfig
from configs.tasks import TaskSpec
from data_pipeline.run_shards import open_shards
from data_pipeline.targets import Prepared
from model.extract import SquadModel, extract_squad, select_experts, squad_cost, task_ids
from model.routing_record import RoutingRecord, Unaffected
from model.routing_stats import RoutingLedger
from model.vit import Kept
from trainer.evaluation.evaluate import Evaluation, Forward, evaluate, squad_forward
from trainer.run_files import read_ledger
from trainer.squads.charts import curve_chart
from trainer.squads.curve import SquadCurve, curve_thresholds, write_curve
from trainer.squads.export import (
    CURVE_PICTURE,
    SQUAD_FILE,
    available_device,
    load_run_model,
    read_squad_json,
    save_squad,
)
from trainer.squads.summary import RoutingSource, SquadLayer, SquadScore, SquadSummary

DEFAULT_THRESHOLD = 0.01
"""An expert that fewer than 1 % of the task's tokens choose leaves; a token that loses one to this rule takes its next
best. Measured on the squads of `modsquad quickstart` (depth_zbuffer, normal): no metric changed by more than 0.005 %,
99.0 and 98.5 % of the tokens were unaffected. Other models may differ: each extraction reports its own change."""


def extract_tasks(
    run_dir: Path,
    tasks: Sequence[str],
    out: Path,
    *,
    threshold: float = DEFAULT_THRESHOLD,
    routing: RoutingSource = "ledger",
    curve: bool = False,
    images: int | None = None,
) -> SquadSummary:
    """Write the squad of `tasks` to the folder `out` and return what was measured.

    Args:
        run_dir: a run with a checkpoint and, for `routing` "ledger", an evaluation of the same step.
        tasks: names of tasks of the run; they leave together, in the run's order.
        out: folder that receives squad.safetensors and squad.json.
        threshold: an expert stays if at least this share of the tokens of one of the tasks chose it, and in any case
            the K that each task uses most; 0 keeps all experts.
        routing: `ledger` counts choices in the evaluation of the checkpoint's step; `validation` counts them anew, on
            the images that are measured.
        curve: also measure the squads of other thresholds and write curve.json and curve.png.
        images: validation images to measure on, from the start of the index; None: `evaluate.images` of the run.

    Raises:
        UserError: no such task, no checkpoint, no evaluation of its step, missing shards, no image with a label of
            one of the tasks, or `out` cannot be written.
    """
    whole = _WholeModel(run_dir, tasks, routing, images)
    squad, summary = whole.cut(threshold)
    save_squad(out, squad, summary)
    if curve:
        measured = whole.curve(summary)
        with atomic_path(out / CURVE_PICTURE) as temporary:
            curve_chart(temporary, measured)
        write_curve(out, measured)
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


class _WholeModel:
    """A run's model, measured on the validation images of some tasks, and the squads cut out of it."""

    def __init__(self, run_dir: Path, tasks: Sequence[str], routing: RoutingSource, images: int | None) -> None:
        """Load the model and run it once. Arguments and errors as in `extract_tasks`."""
        self.device = available_device()
        self.model, self.config, self.step = load_run_model(run_dir, self.device)
        self.specs = _find_tasks(self.config, tasks)
        self.names = [spec.name for spec in self.specs]
        self.routing, self.images = routing, self.config.evaluate.images if images is None else images
        self.index = open_shards(self.config, "val")
        counted = RoutingLedger(self.model.expert_layers, [spec.name for spec in self.model.tasks])
        self.ledger = counted if routing == "validation" else _ledger_of(run_dir, self.step)
        self.record = RoutingRecord(self.model)
        ids = torch.tensor(task_ids(self.model, self.names), device=self.device)

        def forward(prepared: Prepared) -> Mapping[str, Tensor]:
            output = self.record.run(prepared.images, prepared.pair_image, ids[prepared.pair_task])
            counted.update(output.routing)
            return output.predictions

        self.evaluation = self._evaluate(forward)
        if absent := [name for name in self.names if name not in self.record.tasks]:
            raise UserError(f"no validation image to measure on has a label of '{absent[0]}': measure on more images")

    def kept(self, threshold: float) -> Kept:
        """Return the experts that stay at a threshold."""
        return select_experts(self.ledger, self.names, self.model.expert_layers, threshold)

    def cut(self, threshold: float) -> tuple[SquadModel, SquadSummary]:
        """Return the squad of a threshold and what was measured of it."""
        kept = self.kept(threshold)
        squad = extract_squad(self.model, self.names, kept).to(self.device)
        after = self._evaluate(squad_forward(squad, self.names))
        cost = squad_cost(self.model, squad)
        unaffected = self.record.unaffected(kept)
        return squad, SquadSummary(
            step=self.step,
            threshold=threshold,
            routing=self.routing,
            image_size=self.config.data.image_size,
            images=after.images,
            parameters_before=cost.parameters_before,
            parameters_after=cost.parameters_after,
            macs_before=cost.macs_before,
            macs_after=cost.macs_after,
            scores=tuple(_score(spec, self.evaluation, after, unaffected) for spec in self.specs),
            layers=tuple(
                SquadLayer(
                    name=layer.name,
                    kind=layer.kind,
                    num_experts=layer.num_experts,
                    kept=tuple(kept[layer.name]),
                    unaffected_share=unaffected.layers[layer.name],
                )
                for layer in self.model.expert_layers
            ),
        )

    def curve(self, chosen: SquadSummary) -> SquadCurve:
        """Return the squads of other thresholds beside `chosen`, which stands for all that keep the same experts."""
        same = {layer.name: list(layer.kept) for layer in chosen.layers}
        thresholds = curve_thresholds(self.ledger, self.names, self.model.expert_layers)
        others = [self.cut(threshold)[1] for threshold in thresholds if self.kept(threshold) != same]
        points = sorted([chosen, *others], key=lambda point: point.threshold)
        return SquadCurve(threshold=chosen.threshold, points=tuple(points))

    def _evaluate(self, forward: Forward) -> Evaluation:
        return evaluate(
            forward, self.index, self.config, self.specs, constants={}, device=self.device, limit=self.images
        )


def _score(spec: TaskSpec, before: Evaluation, after: Evaluation, unaffected: Unaffected) -> SquadScore:
    """Return one task's main metric in both models; NaN where nothing could be judged."""
    values = (evaluation.scores[spec.name][spec.metric].value for evaluation in (before, after))
    value_before, value_after = (math.nan if value is None else value for value in values)
    return SquadScore(
        task=spec.name,
        metric=spec.metric,
        higher_is_better=spec.higher_is_better,
        before=value_before,
        after=value_after,
        unaffected_tokens=unaffected.tokens[spec.name],
        unaffected_images=unaffected.images[spec.name],
    )


def _find_tasks(config: RunConfig, tasks: Sequence[str]) -> list[TaskSpec]:
    """Return the named tasks in the run's order."""
    known = [spec.name for spec in config.task_specs]
    if unknown := [task for task in tasks if task not in known]:
        raise UserError(f"the run was not trained on task '{unknown[0]}'; its tasks: {', '.join(known)}")
    return [spec for spec in config.task_specs if spec.name in tasks]


def _ledger_of(run_dir: Path, step: int) -> RoutingLedger:
    """Return the ledger of the weights that leave."""
    if (ledger := read_ledger(run_dir, step)) is None:
        raise UserError(
            f"extraction needs the routing ledger of the checkpoint's step {step}, and there is none: run `modsquad "
            f"evaluate {run_dir}` first, or count anew with `--routing validation`"
        )
    return ledger
