"""The usage ledger: how many tokens of each task chose each expert, per expert layer.

Telemetry, reports and extraction read it. Sums are float64 or int64, so they stay exact over a whole run.

Shape legend: T tasks, E experts, K chosen experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from model.dispatch import sum_over_ranks
from model.layer_routing import ExpertLayerInfo, LayerRouting
from model.matching import mutual_information

FORMAT_VERSION = 1


class RoutingLedger:
    """Running sums of `LayerRouting`, per layer.

    Attributes:
        layers: facts of the layers, in order.
        tasks: names of the tasks, in the order of their ids.
        counts: layer name -> (T, E) int64, how often a token of task t chose expert e; a row sums to K * tokens.
        tokens: layer name -> (T,) int64, tokens of task t.
        prob_sums: layer name -> (T, E) float64, sum of the full softmax p(e | x, t).
        entropy_sums: layer name -> (T,) float64, sum of the softmax entropies in nats.
    """

    def __init__(self, layers: Sequence[ExpertLayerInfo], tasks: Sequence[str]) -> None:
        """Start empty.

        Args:
            layers: every expert layer of the model.
            tasks: names of the tasks, in the order of their ids.
        """
        self.layers = tuple(layers)
        self.tasks = tuple(tasks)
        T = len(self.tasks)
        self.counts = {x.name: torch.zeros(T, x.num_experts, dtype=torch.int64) for x in self.layers}
        self.tokens = {x.name: torch.zeros(T, dtype=torch.int64) for x in self.layers}
        self.prob_sums = {x.name: torch.zeros(T, x.num_experts, dtype=torch.float64) for x in self.layers}
        self.entropy_sums = {x.name: torch.zeros(T, dtype=torch.float64) for x in self.layers}

    def update(self, routing: Sequence[LayerRouting]) -> None:
        """Add one forward pass of this rank. The sums live on the device of the latest update."""
        for layer in routing:
            name, device = layer.info.name, layer.counts_TE.device
            self.counts[name] = self.counts[name].to(device) + layer.counts_TE
            self.tokens[name] = self.tokens[name].to(device) + layer.tokens_T.long()
            self.prob_sums[name] = self.prob_sums[name].to(device) + layer.prob_sum_TE.detach().double()
            self.entropy_sums[name] = self.entropy_sums[name].to(device) + layer.entropy_sum_T.double()

    def all_reduce(self, process_group: torch.distributed.ProcessGroup | None) -> None:
        """Replace this rank's sums by those of all ranks, in one collective. Call it once, when counting is over."""
        if self.layers:
            self.load_flat(sum_over_ranks(self.flat(), process_group))

    def flat(self) -> Tensor:
        """Return all sums as one float64 vector on their device, which adds up over ranks; exact for counts to 2^53."""
        parts = [table[layer.name].reshape(-1).double() for layer in self.layers for table in self._tables()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def load_flat(self, flat: Tensor) -> None:
        """Replace all sums by those of a vector that `flat` gave, on its device."""
        pieces = [(table, layer.name) for layer in self.layers for table in self._tables()]
        parts = torch.split(flat, [table[name].numel() for table, name in pieces])
        for (table, name), part in zip(pieces, parts, strict=True):
            table[name] = part.view(table[name].shape).to(table[name].dtype)

    def _tables(self) -> tuple[dict[str, Tensor], ...]:
        return self.counts, self.tokens, self.prob_sums, self.entropy_sums

    def share(self, layer: str, task: str) -> Tensor:
        """Return (E,) float64 on the CPU: the share of the task's tokens that chose each expert; sums to K.

        Raises:
            UserError: the ledger holds no token of that task.
        """
        row = self.tasks.index(task)
        tokens = int(self.tokens[layer][row])
        if tokens == 0:
            raise UserError(f"the routing ledger holds no token of task '{task}': evaluate the run on labelled images")
        return self.counts[layer][row].cpu().double() / tokens

    def shares(self, layer: str) -> Tensor:
        """Return (T, E) float64 on the CPU: `share` of every task; rows of tasks without tokens are 0."""
        return self.counts[layer].cpu().double() / self.tokens[layer].cpu()[:, None].clamp_min(1)

    def mean_probability(self, layer: str) -> Tensor:
        """Return S (T, E) float64 on the CPU, the mean softmax per task; rows of tasks without tokens are 0."""
        return self.prob_sums[layer].cpu() / self.tokens[layer].cpu()[:, None].clamp_min(1)

    def mutual_information(self, layer: str) -> float:
        """Return I(T;E) in nats over the tasks that have tokens, each with the same prior; 0 without any token."""
        seen_T = (self.tokens[layer].cpu() > 0).double()
        return float(mutual_information(self.mean_probability(layer), seen_T / seen_T.sum().clamp_min(1)))

    def to_json(self) -> dict[str, Any]:
        """Return the ledger as JSON-able values.

        {"version", "tasks": [name], "layers": [{"name", "kind", "block", "num_experts", "top_k", "sees_task",
        "tokens": (T,), "counts": (T, E), "prob_sums": (T, E), "entropy_sums": (T,)}]}
        """
        return {
            "version": FORMAT_VERSION,
            "tasks": list(self.tasks),
            "layers": [
                {
                    **vars(layer),
                    "tokens": self.tokens[layer.name].tolist(),
                    "counts": self.counts[layer.name].tolist(),
                    "prob_sums": self.prob_sums[layer.name].tolist(),
                    "entropy_sums": self.entropy_sums[layer.name].tolist(),
                }
                for layer in self.layers
            ],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RoutingLedger":
        """Rebuild what `to_json` gave.

        Raises:
            UserError: another format version, or values of another kind or shape.
            KeyError: a key is missing.
        """
        if not isinstance(values, Mapping):
            raise UserError("routing ledger is damaged: evaluate the run again")
        if values.get("version") != FORMAT_VERSION:
            raise UserError(
                f"routing ledger has format version {values.get('version')}, this program reads {FORMAT_VERSION}: "
                "evaluate the run again"
            )
        try:
            return cls._from_entries(values["tasks"], values["layers"])
        except (TypeError, ValueError) as error:
            raise UserError(f"routing ledger is damaged ({error}): evaluate the run again") from None

    @classmethod
    def _from_entries(cls, tasks: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> "RoutingLedger":
        facts = ("name", "kind", "block", "num_experts", "top_k", "sees_task")
        layers = [ExpertLayerInfo(**{fact: entry[fact] for fact in facts}) for entry in entries]
        ledger = cls(layers, tasks)
        for entry in entries:
            name = entry["name"]
            for key, table in (
                ("tokens", ledger.tokens),
                ("counts", ledger.counts),
                ("prob_sums", ledger.prob_sums),
                ("entropy_sums", ledger.entropy_sums),
            ):
                read = torch.tensor(entry[key], dtype=table[name].dtype)
                if read.shape != table[name].shape:
                    raise ValueError(f"{key} of {name} has shape {tuple(read.shape)}")
                table[name] = read
        return ledger
