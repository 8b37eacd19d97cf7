"""The run's own metrics for Prometheus: losses, and who uses which expert.

A collector that holds the latest line of metrics.jsonl and the routing sums of all ranks; families are made when they
are asked for. Series of routing: `modsquad_expert_tokens_total` has layers x experts x tasks (published base model, 13
tasks: 3120), or layers x experts with `telemetry.task_label: false`; the others have layers x experts, layers x tasks
or fewer.

Shape legend: T tasks, E experts.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from torch import Tensor

from configs.watching import TelemetryConfig
from model.layer_routing import ExpertLayerInfo
from model.routing_stats import RoutingLedger


@dataclass(frozen=True)
class _Window:
    """One layer's routing between two lines, on the CPU.

    Attributes:
        counts_TE: int64, choices of each expert by tokens of each task since the start of the run.
        recent_TE: the same since the line before.
        recent_tokens_T: int64, tokens since the line before.
        recent_entropy_T: float64, sum of their softmax entropies in nats.
    """

    counts_TE: Tensor
    recent_TE: Tensor
    recent_tokens_T: Tensor
    recent_entropy_T: Tensor


@dataclass(frozen=True)
class _Snapshot:
    line: Mapping[str, Any]
    windows: Mapping[str, _Window]


class RunMetrics(Collector):
    """Serves the latest line and the routing that belongs to it; nothing before the first."""

    def __init__(self, config: TelemetryConfig, routing: RoutingLedger, matching_weight: float) -> None:
        """Count from `routing`, the sums of all ranks that a run which resumes has found."""
        self._task_label = config.task_label
        self._layers, self._tasks = routing.layers, routing.tasks
        # One task has nothing to match.
        self._matching_weight = matching_weight if len(routing.tasks) > 1 else 0.0
        self._previous = _sums(routing)
        self._latest: _Snapshot | None = None

    def update(self, line: Mapping[str, Any], routing: RoutingLedger) -> None:
        """Take a line of metrics.jsonl and the routing sums of all ranks since the start of the run."""
        sums = _sums(routing)
        windows = {
            name: _Window(counts, *(now - before for now, before in zip(sums[name], self._previous[name], strict=True)))
            for name, (counts, _, _) in sums.items()
        }
        self._previous = sums
        self._latest = _Snapshot(line, windows)

    def collect(self) -> Iterable[Metric]:
        """Return the families of the latest update."""
        latest = self._latest
        return () if latest is None else (*self._run(latest.line), *self._routing(latest))

    def _run(self, line: Mapping[str, Any]) -> Iterator[Metric]:
        for name, key, text in (
            ("loss", "loss", "Mean total loss of the steps since the line before."),
            ("learning_rate", "learning_rate", "Learning rate of the latest step."),
            ("gradient_norm", "gradient_norm", "Global gradient norm of the latest step, before clipping."),
        ):
            yield _gauge(name, text, [], [([], line[key])])
        by_task = ((name, [name], value) for name, value in line["task_loss"].items())
        yield _gauge("task_loss", "Mean loss per pair.", ["task"], [(labels, value) for _, labels, value in by_task])
        yield _counter("images", "Images used.", [], [([], line["images"])])
        yield _counter(
            "pairs", "(image, task) pairs used.", ["task"], [([name], value) for name, value in line["pairs"].items()]
        )
        yield _gauge(
            "matching_weight", "Weight of the mutual information; 0 with one task.", [], [([], self._matching_weight)]
        )
        information = line["mutual_information"]
        yield _gauge(
            "mutual_information_nats",
            "Mutual information I(T;E) of tasks and experts.",
            ["layer", "kind"],
            [(_place(layer), information[layer.name]) for layer in self._layers if layer.name in information],
        )

    def _routing(self, latest: _Snapshot) -> Iterator[Metric]:
        rows = [(layer, latest.windows[layer.name]) for layer in self._layers]
        yield self._expert_tokens(rows)
        yield _gauge(
            "expert_load_ratio",
            "Choices of an expert over the layer's mean, since the line before; 1: even.",
            ["layer", "kind", "expert"],
            [
                ([*_place(layer), str(expert)], ratio)
                for layer, window in rows
                for expert, ratio in enumerate(_load_ratio(window))
            ],
        )
        yield _gauge(
            "expert_dead",
            "Experts that no token has chosen since the line before.",
            ["layer", "kind"],
            [(_place(layer), int((window.recent_TE.sum(0) == 0).sum())) for layer, window in rows],
        )
        yield _gauge(
            "router_entropy_nats",
            "Mean entropy of the router's softmax, since the line before.",
            ["layer", "kind", "task"],
            [
                ([*_place(layer), task], entropy / tokens if tokens else None)
                for layer, window in rows
                for task, entropy, tokens in zip(
                    self._tasks, window.recent_entropy_T.tolist(), window.recent_tokens_T.tolist(), strict=True
                )
            ],
        )

    def _expert_tokens(self, rows: list[tuple[ExpertLayerInfo, _Window]]) -> Metric:
        text = "Tokens that chose an expert."
        labels = ["layer", "kind", "expert"]
        if not self._task_label:
            return _counter(
                "expert_tokens",
                text,
                labels,
                [
                    ([*_place(layer), str(expert)], count)
                    for layer, window in rows
                    for expert, count in enumerate(window.counts_TE.sum(0).tolist())
                ],
            )
        return _counter(
            "expert_tokens",
            text,
            [*labels, "task"],
            [
                ([*_place(layer), str(expert), task], count)
                for layer, window in rows
                for task, counts in zip(self._tasks, window.counts_TE.tolist(), strict=True)
                for expert, count in enumerate(counts)
            ],
        )


def _sums(routing: RoutingLedger) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return each layer's choices, tokens and entropies as copies on the CPU."""
    return {
        layer.name: (
            routing.counts[layer.name].to("cpu", copy=True),
            routing.tokens[layer.name].to("cpu", copy=True),
            routing.entropy_sums[layer.name].to("cpu", copy=True),
        )
        for layer in routing.layers
    }


def _load_ratio(window: _Window) -> list[float]:
    load_E = window.recent_TE.sum(0).double()
    return [float(value) for value in load_E / load_E.mean().clamp_min(1e-9)]


def _place(layer: ExpertLayerInfo) -> list[str]:
    return [str(layer.block), layer.kind]


Samples = Iterable[tuple[list[str], float | None]]


def _gauge(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    return _filled(GaugeMetricFamily(f"modsquad_{name}", text, labels=labels), samples)


def _counter(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    return _filled(CounterMetricFamily(f"modsquad_{name}", text, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
    """Add the samples; a value that does not exist (null in the line) is NaN, so that an alert sees it."""
    for labels, value in samples:
        family.add_metric(labels, float("nan") if value is None else value)
    return family
