"""The training loop: `Trainer.fit` runs a whole training, `Trainer.step` one optimizer step.

A run that is killed at any moment goes on from its last checkpoint as if nothing had happened: see `trainer.run_state`.
Collectives run on every rank in the same order, never only on rank 0 and never after an error.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.env import RankEnv
from configs.atomic import write_text_atomically
from configs.load import dump_config
from configs.schema import RunConfig
from data_pipeline.batch import Batch
from data_pipeline.loader import TrainLoader
from data_pipeline.skips import Skip
from data_pipeline.targets import prepare_batch
from data_pipeline.workers import start_worker_server
from trainer.assembly import assemble
from trainer.bad_steps import BadSteps
from trainer.checkpoint.reading import load_latest
from trainer.checkpoint.saving import CheckpointSaver
from trainer.continuity import check_continues, check_folder_shared, check_same_on_all
from trainer.distributed.affine_placement import AffinePlacement, apply_placement, choose_placement
from trainer.distributed.agreement import on_each, on_main
from trainer.distributed.interruption import Interrupted, StopSignals
from trainer.engine import StepOutcome, init_distributed
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.validation import Validation
from trainer.journal import append_line, finite, truncate_lines
from trainer.objective import StepStatistics
from trainer.optim import learning_rate
from trainer.progress import StepListener, terminal_progress
from trainer.run_files import remove_later_files
from trainer.run_lock import lock_run
from trainer.run_state import RunState
from trainer.skipped import SkipRecorder, describe_skips
from trainer.telemetry.prometheus import Telemetry
from trainer.telemetry.trackers import Trackers


class Trainer:
    """One run on this rank.

    Attributes:
        config, env: what it was made from.
        run_dir: the run folder.
        parts: data, model, objective, engine.
        state: the place of the run.
    """

    def __init__(self, config: RunConfig, env: RankEnv, listener: StepListener | None = None) -> None:
        """Build everything, and go to the latest checkpoint of the run folder if there is one.

        Args:
            config: the run.
            env: this rank.
            listener: hears about steps on rank 0; None: progress on the terminal.

        Raises:
            UserError: the configuration does not fit the world, the shards, or the run that the folder holds.
        """
        self.config, self.env, self.run_dir = config, env, Path(config.run_dir)
        if config.data.workers:
            start_worker_server()
        init_distributed(env, config.parallel)
        assert dist.group.WORLD is not None, "init_distributed has made it"
        check_same_on_all(config, dist.group.WORLD)
        # Before rank 0 has made the folder the others do not look there: NFS would remember for them that it is absent.
        on_main(dist.group.WORLD, lambda: check_continues(self.run_dir, config))
        self._listener = listener or terminal_progress(config.train.images_per_step)
        self._saved_step = -1
        self._line: dict[str, Any] = {}
        with ExitStack() as resources:  # released here if anything below fails
            self._resources = resources
            self._lock()
            self.parts = assemble(config, env)
            resources.callback(self.parts.engine.close)
            self._validation = Validation(self.run_dir, config, env, self.parts)
            self._bad_steps = BadSteps(config.train.max_bad_steps, self.parts.engine.world_group)
            self.state = RunState.at_start(config, self.parts)
            self._resume()
            self._skips = SkipRecorder(self.run_dir, config.data.max_bad_samples, self.parts.engine.world_group)
            self._telemetry = self._serve_metrics()
            self._trackers = on_each(
                self.parts.engine.world_group,
                lambda: Trackers(self.run_dir, config, env, self.state.steps_done),
            )
            resources.callback(self._trackers.close)
            self._saver = CheckpointSaver(
                self.run_dir, self.parts.engine, config.checkpoint, self._telemetry.on_checkpoint
            )
            resources.callback(self._saver.close)
            if env.is_main and self.parts.start_note:
                self._listener.on_note(self.parts.start_note)
            self._placement: AffinePlacement | None = None
            self._place_experts()
            self._batches = self._open_batches()
            resources.callback(self._close_loader)
            self._resources = resources.pop_all()

    def fit(self) -> None:
        """Train to the last step, with everything that happens on the way: lines, checkpoints, evaluations.

        Raises:
            Interrupted: SIGINT or SIGTERM, after a checkpoint.
            UserError: a damaged shard, more damaged samples than `data.max_bad_samples`, no space, or
                `train.max_bad_steps` steps in a row without a finite gradient.
        """
        steps = self.config.train.steps
        with self._resources, StopSignals() as signals:
            if self.env.is_main:
                self._resources.callback(self._listener.on_end)
                self._listener.on_start(self.state.steps_done, steps)
            self._telemetry.on_start(self.state.steps_done)
            if self._validation.is_owed(self.state.steps_done):
                self.evaluate(signals)
            while self.state.steps_done < steps:
                outcome = self.step()
                done = self.state.steps_done
                if done % self.config.train.log_every_steps == 0 or done == steps:
                    self._log(outcome)
                if self.env.is_main:
                    self._listener.on_step(done, self._line)
                self._stop_if_told(signals)
                self._saver.check()
                if done % self.config.checkpoint.every_steps == 0 or done == steps:
                    self._save()
                    if done < steps and self._place_experts():
                        self._close_loader()
                        self._batches = self._open_batches()
                if self._validation.is_due(done):
                    self.evaluate(signals)
            if self._validation.latest_step != self.state.steps_done:
                self.evaluate(signals)
            self._saver.wait()
            if self.env.is_main and self.state.skips.samples:
                self._listener.on_note(describe_skips(self.state.skips, self.run_dir))

    def step(self) -> StepOutcome:
        """Run one optimizer step on the next global batch. A bad step leaves no trace but its place in the data.

        Raises:
            UserError: too many bad steps in a row, a damaged shard, or too many damaged samples.
        """
        started, waited, left_out = time.perf_counter(), 0.0, list[Skip]()
        optim, train, parts = self.config.optim, self.config.train, self.parts
        running_mean = parts.matching.snapshot()
        parts.engine.set_learning_rate(learning_rate(self.state.steps_done, optim, train.steps))
        scale = float(self.env.world * parts.accumulation)
        passes: list[tuple[torch.Tensor, StepStatistics, tuple[str, ...]]] = []
        for _ in range(parts.accumulation):
            asked = time.perf_counter()
            batch = on_each(parts.engine.world_group, lambda: next(self._batches))
            left_out += batch.left_out
            waited += time.perf_counter() - asked
            prepared = prepare_batch(batch.to(parts.engine.device), parts.tasks, self.config.data.image_size)
            loss, statistics = parts.engine(prepared, scale)
            parts.engine.backward(loss)
            outcome = parts.engine.step()
            passes.append((loss.detach(), statistics, batch.keys))
        self.state.steps_done += 1
        for skip in self._skips.record(self.state.skips, left_out, self.state.steps_done):
            if self.env.is_main:
                self._listener.on_note(f"left out: {skip.message}")
        if outcome.skipped:
            parts.matching.load_state_dict(running_mean)
            self.state.bad_steps += 1
            first = self.state.cursor.position
            self._bad_steps.add(
                self.state.steps_done,
                range(first, first + train.images_per_step),
                suspects=[key for _, found, keys in passes if not found.loss_sum_T.isfinite().all() for key in keys],
                batch=[key for _, _, keys in passes for key in keys],
            )
        else:
            self._bad_steps.forget()
            for loss, statistics, _ in passes:
                self.state.journal.add_micro_batch(loss, statistics, scale)
                self.state.ledger.update(statistics.routing)
            self.state.journal.add_step(time.perf_counter() - started, waited, self.env.world)
        seconds = time.perf_counter() - started
        self._telemetry.on_step(self.state.steps_done, seconds, waited, bad=outcome.skipped)
        self.state.cursor = self.state.cursor.advanced(train.images_per_step)
        return outcome

    def evaluate(self, signals: StopSignals | None = None) -> Evaluation:
        """Evaluate on the validation shards, on all ranks, and write evaluation and routing ledger. A collective call.

        Raises:
            Interrupted: one of `signals` came, after a checkpoint.
            UserError: a damaged shard, or no space.
        """

        def stop_if_told() -> None:
            if signals is not None:
                self._stop_if_told(signals)

        step = self.state.steps_done
        evaluation = self._validation.run(step, before_batch=stop_if_told)
        self._on_main_alone(lambda: self._trackers.on_evaluation(evaluation.to_json(step, "val")))
        return evaluation

    def _stop_if_told(self, signals: StopSignals) -> None:
        """Save and raise Interrupted when a signal has reached any rank. A collective call."""
        if stop := signals.agreed(self.parts.engine.world_group):
            self._save()
            self._saver.wait()
            raise Interrupted(stop, self.state.steps_done)

    def close(self) -> None:
        """Release loader, engine and run folder; `fit` has done so when it returns."""
        self._resources.close()

    def _lock(self) -> None:
        """Keep other runs out of the folder, and ranks that have another one; every rank raises if rank 0 cannot."""
        assert dist.group.WORLD is not None, "init_distributed has made it"
        on_main(dist.group.WORLD, lambda: self._resources.enter_context(lock_run(self.run_dir)))
        check_folder_shared(self.run_dir, dist.group.WORLD)

    def _on_main_alone(self, write: Callable[[], object]) -> None:
        """Run `write` on rank 0; if it fails, all ranks raise. A collective call."""
        on_each(self.parts.engine.world_group, lambda: write() if self.env.is_main else None)

    def _resume(self) -> None:
        """Go to the latest checkpoint, if any, and make the run folder say so."""
        restored = load_latest(self.run_dir, self.parts.engine)
        if restored is not None:
            self.state.restore(restored.step, restored.state, self.parts, self.env.rank, self.config.seed)
            self._saved_step = restored.step
        if self.env.is_main:
            for problem in restored.damaged if restored else ():
                self._listener.on_note(f"passed over a damaged checkpoint: {problem}")
        self._on_main_alone(lambda: write_text_atomically(self.run_dir / "config.yaml", dump_config(self.config)))
        self._on_main_alone(lambda: truncate_lines(self.run_dir, self.state.steps_done))
        self._on_main_alone(lambda: remove_later_files(self.run_dir, self.state.steps_done))

    def _serve_metrics(self) -> Telemetry:
        """Serve this rank's metrics; if one rank cannot, all raise. A collective call."""
        parts = self.parts
        _, routing = self.state.gather(parts.engine.world_group, self.env.rank)

        def serve() -> Telemetry:
            telemetry = Telemetry(
                self.run_dir,
                self.config.telemetry,
                self.env,
                traffic=parts.traffic,
                routing=routing,
                matching_weight=self.config.matching.weight,
                skipped=lambda: dict(self._skips.on_rank),  # a copy, as another thread reads it
            )
            self._resources.callback(telemetry.close)
            return telemetry

        return on_each(parts.engine.world_group, serve)

    def _place_experts(self) -> bool:
        """Move experts to where the ledger wants them by now; return whether any moved. A collective call."""
        if self.config.parallel.expert_placement == "in_order":
            return False
        world = self.parts.engine.world_group
        _, routing = self.state.gather(world, self.env.rank)
        # One rank chooses: another kind of CPU may round a tie the other way.
        placement = on_main(world, lambda: choose_placement(self.config, routing, self.parts.micro_batch))
        if placement is None or placement == self._placement:
            return False
        apply_placement(placement, self.parts.model, self.parts.engine)
        if self.env.is_main:
            self._listener.on_note(placement.describe(self._placement))
        self._placement = placement
        return True

    def _open_batches(self) -> Iterator[Batch]:
        loader = TrainLoader(
            self.parts.train_index,
            self.config.data,
            self.parts.tasks,
            images_per_step=self.config.train.images_per_step,
            micro_batch=self.parts.micro_batch,
            rank=self.env.rank,
            world=self.env.world,
            seed=self.config.seed,
            cursor=self.state.cursor,
            steps=self.config.train.steps - self.state.steps_done,
            homes=self._placement.homes if self._placement else None,
        )
        self._loader = loader
        if self.env.is_main and (unlabelled := loader.plan.unlabelled):
            total = len(self.parts.train_index)
            self._listener.on_note(f"left out: {unlabelled} of {total} training images, without a label of these tasks")
        return iter(loader)

    def _close_loader(self) -> None:
        self._loader.close()  # the last one: experts that move have another loader made

    def _log(self, outcome: StepOutcome) -> None:
        """Write a line of metrics.jsonl. A collective call."""
        state, done = self.state, self.state.steps_done
        total, routing = state.gather(self.parts.engine.world_group, self.env.rank)
        self._line = {
            "step": done,
            "epoch": state.cursor.position / len(self.parts.train_index),
            **state.journal.line(total),
            "learning_rate": learning_rate(done - 1, self.config.optim, self.config.train.steps),
            "gradient_norm": finite(outcome.gradient_norm),
            "images": state.cursor.position,
            "bad_steps": state.bad_steps,
            "skipped": state.skips.by_shard(),
            "time": time.time(),
        }
        self._on_main_alone(lambda: append_line(self.run_dir, self._line))
        self._on_main_alone(lambda: self._trackers.on_line(self._line))
        self._telemetry.on_line(self._line, routing)
        state.journal.next_line()

    def _save(self) -> None:
        """Begin a checkpoint of this step, unless there is one. A collective call."""
        if self._saved_step == self.state.steps_done:
            return
        self._saver.save(self.state.steps_done, self.state.collect(self.parts.engine.world_group, self.env.rank))
        self._saved_step = self.state.steps_done
