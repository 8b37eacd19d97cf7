"""Prometheus: what a run tells about itself while it trains (DESIGN 5).

Every rank serves its own health on a port of its own; rank 0 also serves what belongs to the run, summed over all
ranks: losses, and the routing of every layer, expert and task. Training only stores numbers; text is made when
Prometheus asks, in the server's thread. RUN/targets/rank_<rank>.json announces each port to Prometheus' file-based
service discovery, with the labels `run`, `rank` and `node`; it goes when the rank ends.
"""

import errno
import json
import platform
import socket
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.env import RankEnv
from configs.atomic import write_text_atomically
from configs.errors import UserError
from configs.watching import TelemetryConfig
from model.dispatch import TrafficMeter
from model.routing_stats import RoutingLedger
from trainer.telemetry.run_metrics import RunMetrics

TARGETS = "targets"
# From a tiny model's step on a GPU to a large global batch with accumulation.
_STEP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)


class Telemetry:
    """The metrics of one rank and their HTTP server.

    Attributes:
        url: where they are served; None: nowhere.
        port: of the server; None without one.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TelemetryConfig,
        env: RankEnv,
        *,
        traffic: TrafficMeter,
        routing: RoutingLedger,
        matching_weight: float,
        skipped: Callable[[], Mapping[tuple[str, str], int]],
    ) -> None:
        """Start to serve, and announce it.

        Args:
            run_dir: the run folder.
            config: where to serve, and what.
            env: this rank.
            traffic: counts the bytes of token exchange.
            routing: what all ranks have routed so far, as a run that resumes found it.
            matching_weight: `matching.weight` of the run.
            skipped: returns (shard, reason) -> samples left out on this rank so far.

        Raises:
            UserError: the port is taken or not allowed, or the address is not one of this machine.
        """
        registry = CollectorRegistry()
        self._make_metrics(registry, run_dir, env)
        registry.register(_Counts(traffic, skipped))
        self._run = RunMetrics(config, routing, matching_weight) if env.is_main else None
        if self._run is not None:
            registry.register(self._run)
        self._target: Path | None = None
        self.url: str | None = None
        self.port: int | None = None
        if config.port is not None:
            self._serve(registry, config, env.local_rank)
            self._announce(run_dir, config, env)

    def _make_metrics(self, registry: CollectorRegistry, run_dir: Path, env: RankEnv) -> None:
        self._step = Gauge("modsquad_step", "Finished optimizer steps.", registry=registry)
        self._step_time = Gauge(
            "modsquad_step_timestamp_seconds", "Time of the latest finished step.", registry=registry
        )
        self._step_seconds = Histogram(
            "modsquad_step_seconds", "Wall time of one optimizer step.", buckets=_STEP_SECONDS, registry=registry
        )
        self._wait = Counter("modsquad_data_wait_seconds", "Wall time spent waiting for batches.", registry=registry)
        self._bad_steps = Counter(
            "modsquad_bad_steps",
            "Steps of this process without an update, their gradient not being finite.",
            registry=registry if env.is_main else None,  # all ranks agree on them, one tells
        )
        self._checkpoint = Gauge(
            "modsquad_checkpoint_timestamp_seconds", "Time of the latest checkpoint of this run.", registry=registry
        )
        Info("modsquad_run", "The run, as the label `run` of its targets.", registry=registry).info(
            {"name": run_dir.name}
        )
        packages = {name: version(name) for name in ("modsquad", "torch", "deepspeed")}
        Info("modsquad_build", "Versions.", registry=registry).info({**packages, "python": platform.python_version()})

    def on_start(self, step: int) -> None:
        """Training starts after `step` finished steps; the age of what it has not yet done counts from now."""
        self._step.set(step)
        self._step_time.set_to_current_time()
        self._checkpoint.set_to_current_time()

    def on_step(self, step: int, seconds: float, wait_seconds: float, *, bad: bool) -> None:
        """Step `step` (from 1) took `seconds`, of which `wait_seconds` were spent waiting for data.

        A `bad` one updated nothing, its gradient not being finite.
        """
        self._step.set(step)
        self._bad_steps.inc(bad)
        self._step_time.set_to_current_time()
        self._step_seconds.observe(seconds)
        self._wait.inc(wait_seconds)

    def on_line(self, line: Mapping[str, Any], routing: RoutingLedger) -> None:
        """Take what the run says of itself, on rank 0: a line of metrics.jsonl, and the routing since its start."""
        if self._run is not None:
            self._run.update(line, routing)

    def on_checkpoint(self) -> None:
        """A checkpoint is safe."""
        self._checkpoint.set_to_current_time()

    def close(self) -> None:
        """Stop serving and take the announcement back."""
        if self._target is not None:
            self._target.unlink(missing_ok=True)
            self._target = None
        if self.url is not None:
            self.url = None
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def _serve(self, registry: CollectorRegistry, config: TelemetryConfig, local_rank: int) -> None:
        assert config.port is not None, "the caller asked"
        port = config.port + local_rank if config.port else 0
        try:
            self._server, self._thread = start_http_server(port, config.address, registry)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            raise UserError(
                f"metrics cannot be served on {config.address} port {port} ("
                f"{'another program listens there' if taken else error}): choose another telemetry.port (0: any that "
                "is free) or telemetry.address, or telemetry.port=null for none"
            ) from None
        self.port = self._server.server_port
        self.url = f"http://{_host(config.address)}:{self.port}/metrics"

    def _announce(self, run_dir: Path, config: TelemetryConfig, env: RankEnv) -> None:
        folder = run_dir / TARGETS
        if env.is_main:
            remove_targets(run_dir, first_rank=env.world)
        group = {
            "targets": [f"{_host(config.address)}:{self.port}"],
            "labels": {"run": run_dir.name, "rank": str(env.rank), "node": socket.gethostname()},
        }
        self._target = folder / f"rank_{env.rank:05d}.json"
        write_text_atomically(self._target, json.dumps([group]) + "\n")


def remove_targets(run_dir: Path, first_rank: int = 0) -> None:
    """Remove the announcements of the ranks from `first_rank` on, which a killed or larger world has left behind."""
    for path in (run_dir / TARGETS).glob("rank_*.json"):
        if int(path.stem.removeprefix("rank_")) >= first_rank:
            path.unlink(missing_ok=True)


def _host(address: str) -> str:
    """Return the name by which others reach a server bound to `address`: that of this machine if it is bound to all."""
    try:
        bound = ip_address(address)
    except ValueError:
        return address
    if bound.is_unspecified:
        return socket.getfqdn()
    return f"[{address}]" if bound.version == 6 else address


class _Counts(Collector):
    """Counters that other parts of the program keep."""

    def __init__(self, traffic: TrafficMeter, skipped: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._traffic, self._skipped = traffic, skipped

    def collect(self) -> Iterable[Metric]:
        moved = CounterMetricFamily(
            "modsquad_all_to_all_bytes", "Bytes of token exchange with other ranks.", labels=["direction"]
        )
        moved.add_metric(["sent"], self._traffic.sent_bytes)
        moved.add_metric(["received"], self._traffic.received_bytes)
        yield moved
        skipped = CounterMetricFamily(
            "modsquad_skipped_samples", "Damaged samples left out on this rank.", labels=["shard", "reason"]
        )
        for labels, count in self._skipped().items():
            skipped.add_metric(labels, count)
        yield skipped
