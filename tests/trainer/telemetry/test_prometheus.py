"""Metrics for Prometheus: what a run serves over HTTP while it trains, on one rank and on several."""

import json
import math
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from cluster.env import RankEnv
from configs.errors import UserError
from configs.watching import TelemetryConfig
from model.dispatch import TrafficMeter
from model.layer_routing import ExpertLayerInfo
from model.routing_stats import RoutingLedger
from tests.ranks import run_ranks
from tests.trainer.loop_run import loop_config, make_shards
from trainer.engine import close_distributed
from trainer.loop import Trainer
from trainer.run_files import read_steps
from trainer.telemetry.prometheus import Telemetry

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
LAYER = ExpertLayerInfo(name="blocks.1.mlp", kind="mlp", block=1, num_experts=4, top_k=1, sees_task=True)


def scrape(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"modsquad_{name}", tuple(sorted(labels.items()))]


def names(samples: Samples) -> set[str]:
    return {name for name, _ in samples}


def scrape_targets(run_dir: Path) -> list[Samples]:
    """Scrape what the run folder announces, in the order of ranks."""
    found = []
    for rank, path in enumerate(sorted((run_dir / "targets").iterdir())):
        (group,) = json.loads(path.read_text())
        assert group["labels"] == {"run": run_dir.name, "rank": str(rank), "node": socket.gethostname()}
        (target,) = group["targets"]
        found.append(scrape(f"http://{target}/metrics"))
    return found


class Scraper:
    """Scrapes all ranks at the last step."""

    def __init__(self, run_dir: Path, last_step: int) -> None:
        self.run_dir, self.last_step = run_dir, last_step
        self.scraped: list[Samples] = []

    def on_start(self, step: int, steps: int) -> None: ...

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        if step == self.last_step:
            self.scraped = scrape_targets(self.run_dir)

    def on_note(self, text: str) -> None: ...

    def on_end(self) -> None: ...


def train_and_scrape(rank: int, world: int, folder: str, *overrides: str) -> tuple[list[Samples], RoutingLedger]:
    config = loop_config(Path(folder), *overrides)
    scraper = Scraper(Path(config.run_dir), config.train.steps)
    trainer = Trainer(config, RankEnv(rank=rank, world=world, local_rank=rank), scraper)
    trainer.fit()
    return scraper.scraped, trainer.state.ledger


def train_alone(folder: Path, *overrides: str) -> tuple[list[Samples], RoutingLedger]:
    try:
        return train_and_scrape(0, 1, str(folder), *overrides)
    finally:
        close_distributed()


def assert_tokens_are_those_of(ledger: RoutingLedger, samples: Samples) -> None:
    for layer in ledger.layers:
        place = {"layer": str(layer.block), "kind": layer.kind}
        for task, counts in zip(ledger.tasks, ledger.counts[layer.name].tolist(), strict=True):
            served = [value(samples, "expert_tokens_total", **place, expert=str(e), task=task) for e in range(4)]
            assert served == counts


def test_rank_0_serves_the_run_and_every_rank_its_own_health(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (first, ledger), _ = run_ranks(train_and_scrape, 2, str(tmp_path), "parallel.ep_size=2")
    main, other = first
    line = read_steps(tmp_path / "run")[-1]
    assert value(main, "loss") == pytest.approx(line.loss)
    assert value(main, "learning_rate") == pytest.approx(line.learning_rate)
    assert value(main, "images_total") == 24
    assert value(main, "pairs_total", task="normal") == 24
    assert value(main, "bad_steps_total") == 0
    for task, loss in line.task_loss.items():
        assert value(main, "task_loss", task=task) == pytest.approx(loss, nan_ok=True)
    for layer in ledger.layers:
        place = {"layer": str(layer.block), "kind": layer.kind}
        information = value(main, "mutual_information_nats", **place)
        assert information == pytest.approx(line.mutual_information[layer.name])
        ratios = [value(main, "expert_load_ratio", **place, expert=str(expert)) for expert in range(4)]
        assert sum(ratios) == pytest.approx(4)
        assert value(main, "expert_dead", **place) == ratios.count(0.0)
        assert 0 < value(main, "router_entropy_nats", **place, task="normal") <= math.log(4) + 1e-6
    assert_tokens_are_those_of(ledger, main)

    for samples in (main, other):
        assert value(samples, "step") == value(samples, "step_seconds_count") == 6
        assert 0 <= value(samples, "data_wait_seconds_total") <= value(samples, "step_seconds_sum")
        assert value(samples, "checkpoint_timestamp_seconds") <= value(samples, "step_timestamp_seconds")
        assert any(name == "modsquad_build_info" for name, _ in samples)
    assert not {"modsquad_loss", "modsquad_bad_steps_total"} & names(other)
    assert "modsquad_expert_tokens_total" not in names(other)
    moved = [[value(s, "all_to_all_bytes_total", direction=way) for s in first] for way in ("sent", "received")]
    assert sum(moved[0]) == sum(moved[1]) > 0


def test_a_run_that_ends_takes_its_targets_back(tmp_path: Path) -> None:
    make_shards(tmp_path)
    left = tmp_path / "run" / "targets" / "rank_00001.json"  # by a rank that was killed
    left.parent.mkdir(parents=True)
    left.write_text("[]")
    scraped, _ = train_alone(tmp_path, "train.steps=2")
    assert len(scraped) == 1, "the other rank is no part of this world"
    assert list((tmp_path / "run" / "targets").iterdir()) == []


def test_counters_go_on_where_a_resumed_run_goes_on(tmp_path: Path) -> None:
    make_shards(tmp_path)
    train_alone(tmp_path, "train.steps=3")
    (samples,), ledger = train_alone(tmp_path, "train.steps=5")
    assert value(samples, "images_total") == 20
    assert_tokens_are_those_of(ledger, samples)
    assert value(samples, "step_seconds_count") == 2, "a rank's own health is that of the process"


def refusal(rank: int, world: int, folder: str, port: int) -> str:
    with pytest.raises(UserError) as refused:
        train_and_scrape(rank, world, folder, f"telemetry.port={port}")
    return str(refused.value)


def test_a_port_that_is_taken_on_one_rank_stops_all(tmp_path: Path) -> None:
    make_shards(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first, second = run_ranks(refusal, 2, str(tmp_path), port - 1)
    assert first == second
    assert f"port {port} (another program listens there)" in first
    assert list((tmp_path / "run" / "targets").iterdir()) == []


def telemetry(
    folder: Path,
    config: TelemetryConfig,
    skipped: Mapping[tuple[str, str], int],
    tasks: Sequence[str] = ("depth", "scene"),
) -> Telemetry:
    return Telemetry(
        folder,
        config,
        RankEnv(),
        traffic=TrafficMeter(),
        routing=RoutingLedger([LAYER], tasks),
        matching_weight=0.25,
        skipped=lambda: skipped,
    )


def line(loss: float | None) -> dict[str, Any]:
    return {
        "loss": loss,
        "learning_rate": 0.1,
        "gradient_norm": None,
        "task_loss": {"depth": 1.0, "scene": None},
        "mutual_information": {"blocks.1.mlp": 0.5},
        "images": 8,
        "pairs": {"depth": 3, "scene": 0},
    }


def routing(counts: list[list[int]], tasks: Sequence[str] = ("depth", "scene")) -> RoutingLedger:
    ledger = RoutingLedger([LAYER], tasks)
    ledger.counts[LAYER.name] = torch.tensor(counts)
    ledger.tokens[LAYER.name] = ledger.counts[LAYER.name].sum(1)
    ledger.entropy_sums[LAYER.name] = ledger.tokens[LAYER.name] * 0.25
    return ledger


def test_loads_are_those_since_the_line_before(tmp_path: Path) -> None:
    served = telemetry(tmp_path, TelemetryConfig(), {("a.tar", "damaged"): 2})
    assert served.url is not None
    served.on_line(line(3.0), routing([[6, 1, 1, 0], [0, 0, 0, 4]]))
    served.on_line(line(None), routing([[8, 1, 1, 0], [0, 0, 0, 10]]))
    samples = scrape(served.url)
    place = {"layer": "1", "kind": "mlp"}
    ratios = [value(samples, "expert_load_ratio", **place, expert=str(expert)) for expert in range(4)]
    assert ratios == [1.0, 0.0, 0.0, 3.0]
    assert value(samples, "expert_dead", **place) == 2
    assert value(samples, "expert_tokens_total", **place, expert="0", task="depth") == 8
    assert value(samples, "router_entropy_nats", **place, task="scene") == pytest.approx(0.25)
    assert math.isnan(value(samples, "loss"))
    assert math.isnan(value(samples, "task_loss", task="scene"))
    assert value(samples, "skipped_samples_total", shard="a.tar", reason="damaged") == 2
    served.close()
    with pytest.raises(urllib.error.URLError):
        scrape(f"http://127.0.0.1:{served.port}/metrics")


def test_bad_steps_are_served_before_the_first_line(tmp_path: Path) -> None:
    served = telemetry(tmp_path, TelemetryConfig(), {})
    assert served.url is not None
    assert value(scrape(served.url), "bad_steps_total") == 0
    served.on_step(1, 0.5, 0.0, bad=True)
    served.on_step(2, 0.5, 0.0, bad=False)
    assert value(scrape(served.url), "bad_steps_total") == 1
    served.close()


@pytest.mark.parametrize(("tasks", "weight"), [(("depth", "scene"), 0.25), (("depth",), 0.0)])
def test_one_task_has_nothing_to_match(tmp_path: Path, tasks: Sequence[str], weight: float) -> None:
    served = telemetry(tmp_path, TelemetryConfig(), {}, tasks)
    served.on_line(line(3.0), routing([[1, 1, 1, 1]] * len(tasks), tasks))
    assert served.url is not None
    assert value(scrape(served.url), "matching_weight") == weight
    served.close()


def test_the_task_label_can_be_dropped(tmp_path: Path) -> None:
    served = telemetry(tmp_path, TelemetryConfig(task_label=False), {})
    served.on_line(line(3.0), routing([[6, 1, 1, 0], [0, 0, 0, 4]]))
    assert served.url is not None
    samples = scrape(served.url)
    assert value(samples, "expert_tokens_total", layer="1", kind="mlp", expert="3") == 4
    assert sum(name == "modsquad_expert_tokens_total" for name, _ in samples) == 4
    served.close()


def test_nothing_is_served_without_a_port(tmp_path: Path) -> None:
    served = telemetry(tmp_path, TelemetryConfig(port=None), {})
    assert served.url is None
    assert not (tmp_path / "targets").exists()
    served.close()


def test_an_address_of_all_interfaces_is_announced_by_name(tmp_path: Path) -> None:
    served = telemetry(tmp_path, TelemetryConfig(address="0.0.0.0"), {})
    (group,) = json.loads((tmp_path / "targets" / "rank_00000.json").read_text())
    assert group["targets"] == [f"{socket.getfqdn()}:{served.port}"]
    served.close()


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics cannot be served on 192\.0\.2\.1 port 0"):
        telemetry(tmp_path, TelemetryConfig(address="192.0.2.1"), {})
