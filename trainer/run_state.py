"""What a run carries from step to step besides weights and moments, and how a checkpoint holds it.

Everything here is free of the number of ranks: sums are collected over ranks first, and land on rank 0 afterwards.
Random numbers need no place: each follows from the seed and from what it is for, none from those drawn before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import RunConfig
from data_pipeline.cursor import Cursor
from data_pipeline.skips import SkipCounts
from model.matching import Matching
from model.routing_stats import RoutingLedger
from trainer.assembly import Assembly
from trainer.journal import Journal


@dataclass(kw_only=True)
class RunState:
    """The place of a run.

    Attributes:
        cursor: place in the data, after the finished steps.
        matching: the matching loss, with its running mean.
        ledger: routing of all training steps; this rank's share of the sums.
        journal: sums for the next line of metrics.jsonl; this rank's share.
        steps_done: finished steps, bad ones included.
        bad_steps: steps whose gradient was not finite, so that nothing was updated.
        skips: damaged members left out on all ranks, the same on every rank.
    """

    cursor: Cursor
    matching: Matching
    ledger: RoutingLedger
    journal: Journal
    steps_done: int = 0
    bad_steps: int = 0
    skips: SkipCounts = field(default_factory=SkipCounts)

    @classmethod
    def at_start(cls, config: RunConfig, parts: Assembly) -> "RunState":
        """Return the state before the first step."""
        layers, tasks = parts.model.expert_layers, [spec.name for spec in parts.tasks]
        return cls(
            cursor=Cursor(position=0, seed=config.seed, fingerprint=parts.train_index.fingerprint),
            matching=parts.matching,
            ledger=RoutingLedger(layers, tasks),
            journal=Journal(tasks, [layer.name for layer in layers if layer.sees_task], parts.engine.device),
        )

    def gather(self, group: dist.ProcessGroup, rank: int) -> tuple[Tensor, RoutingLedger]:
        """Move the journal's and the ledger's sums of all ranks to rank 0, in one collective and one copy to the CPU.

        Returns:
            Both on the CPU, the same on every rank.
        """
        sums = self.journal.sums
        flat = torch.cat([sums, self.ledger.flat().to(sums.device)])
        dist.all_reduce(flat, group=group)
        total, routing = torch.split(flat.to("cpu", copy=True), [len(sums), len(flat) - len(sums)])
        self.journal.restore(total, rank)
        self.ledger.load_flat(flat[len(sums) :])
        self._keep_sums_on_first(rank)
        ledger = RoutingLedger(self.ledger.layers, self.ledger.tasks)
        ledger.load_flat(routing)
        return total, ledger

    def collect(self, group: dist.ProcessGroup, rank: int) -> dict[str, Any]:
        """Return what a checkpoint holds, the same on every rank. A collective call."""
        journal, ledger = self.gather(group, rank)
        return {
            "cursor": self.cursor.to_dict(),
            "matching": self.matching.state_dict(),
            "ledger": ledger.to_json(),
            "journal": journal,
            "bad_steps": self.bad_steps,
            "skips": self.skips.to_dict(),
        }

    def restore(self, step: int, state: Mapping[str, Any], parts: Assembly, rank: int, seed: int) -> None:
        """Continue from a checkpoint, on any number of ranks.

        Raises:
            UserError: the training shards are not those of the checkpoint.
        """
        self.cursor = Cursor.from_dict(state["cursor"])
        self.cursor.check(parts.train_index, seed)
        self.matching.load_state_dict(state["matching"])
        self.ledger = RoutingLedger.from_json(state["ledger"])
        self._keep_sums_on_first(rank)
        self.journal.restore(state["journal"], rank)
        self.steps_done, self.bad_steps = step, state["bad_steps"]
        self.skips = SkipCounts.from_dict(state["skips"])

    def _keep_sums_on_first(self, rank: int) -> None:
        """Leave the collected ledger to rank 0, lest the next collection count it once per rank."""
        if rank != 0:
            self.ledger = RoutingLedger(self.ledger.layers, self.ledger.tasks)
