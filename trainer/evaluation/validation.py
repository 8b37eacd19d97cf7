"""Evaluations in the course of a training: when one is due, and what it leaves in the run folder."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from cluster.env import RankEnv
from configs.schema import RunConfig
from data_pipeline.targets import Prepared
from model.routing_stats import RoutingLedger
from trainer.assembly import Assembly
from trainer.distributed.agreement import on_each, on_main
from trainer.evaluation.constant import Constants, constant_predictor
from trainer.evaluation.evaluate import (
    Evaluation,
    evaluate,
    model_forward,
    write_evaluation,
    write_ledger,
)
from trainer.run_files import evaluation_path


class Validation:
    """Evaluates the model in training on the validation shards, on all ranks.

    Attributes:
        latest_step: of the latest evaluation by this process; -1 before.
    """

    def __init__(self, run_dir: Path, config: RunConfig, env: RankEnv, parts: Assembly) -> None:
        """Take what the evaluations need."""
        self._run_dir, self._config, self._env, self._parts = run_dir, config, env, parts
        self._constants: Constants | None = None
        self.latest_step = -1

    def is_due(self, step: int) -> bool:
        """Whether `evaluate.every_steps` asks for an evaluation after `step` finished steps."""
        every = self._config.evaluate.every_steps
        return every > 0 and step > 0 and step % every == 0

    def is_owed(self, step: int) -> bool:
        """Whether the run was ended between a checkpoint and the evaluation of the same step. A collective call."""
        path = evaluation_path(self._run_dir, step, "val")
        return on_main(self._parts.engine.world_group, lambda: self.is_due(step) and not path.exists())

    def run(self, step: int, before_batch: Callable[[], None]) -> Evaluation:
        """Evaluate, and write evaluation and routing ledger. A collective call.

        Args:
            step: finished steps.
            before_batch: called on every rank before each batch; may raise to end the evaluation.

        Raises:
            UserError: a damaged shard, or no space.
        """
        parts, config = self._parts, self._config
        ledger = RoutingLedger(parts.model.expert_layers, [spec.name for spec in parts.tasks])
        forward = model_forward(parts.model, ledger)

        def forward_unless_told(prepared: Prepared) -> Mapping[str, Tensor]:
            before_batch()
            return forward(prepared)

        constants = self._constants = self._constants or self._fit_constants()
        parts.objective.eval()
        evaluation = evaluate(
            forward_unless_told,
            parts.val_index,
            config,
            parts.tasks,
            constants=constants,
            rank=self._env.rank,
            world=self._env.world,
            group=parts.engine.world_group,
            device=parts.engine.device,
            limit=config.evaluate.images,
        )
        parts.objective.train()
        ledger.all_reduce(parts.engine.world_group)
        on_each(parts.engine.world_group, lambda: self._write(step, evaluation, ledger) if self._env.is_main else None)
        self.latest_step = step
        return evaluation

    def _fit_constants(self) -> Constants:
        parts, config = self._parts, self._config
        return on_each(
            parts.engine.world_group,
            lambda: constant_predictor(
                parts.train_index, parts.tasks, config.data.image_size, tolerant=config.data.max_bad_samples > 0
            ),
        )

    def _write(self, step: int, evaluation: Evaluation, ledger: RoutingLedger) -> None:
        write_ledger(self._run_dir, ledger, step=step)
        write_evaluation(self._run_dir, evaluation, step=step, split="val")
