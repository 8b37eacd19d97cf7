"""A real Prometheus watches a real training on two ranks, and every panel of the dashboard has data."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.env import RankEnv, free_port
from configs.errors import UserError
from configs.load import dump_config
from configs.schema import RunConfig
from tests.services.prometheus import Prometheus, assert_accepts, running_prometheus
from tests.services.waiting import wait_until
from tests.trainer.loop_run import loop_config, make_shards
from trainer.telemetry.monitor import write_monitoring

WINDOW = "15s"


@contextmanager
def training(folder: Path) -> Iterator[None]:
    """Train on two ranks for ever."""
    port = free_port()
    overrides = ("train.steps=100000", "parallel.ep_size=2", "data.tasks_per_image=2")
    processes = []
    for rank in range(2):
        env = RankEnv(rank=rank, world=2, local_rank=rank, master_port=port)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.trainer.noted_training", str(folder), *overrides],
                env={**os.environ, **env.variables(), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
            )
        )
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(timeout=60) for process in processes] == [143, 143]


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def fill_in(text: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        text = re.sub(rf"\$\{{{name}\}}|\${name}\b", value, text)
    return text


def resolve_variables(server: Prometheus, dashboard: dict[str, Any]) -> dict[str, str]:
    """Return a value for every variable, as Grafana would find it."""
    found = {"__rate_interval": WINDOW}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", fill_in(variable["query"], found))
            assert asked, variable["query"]
            values = server.get(f"label/{asked[2]}/values", **{"match[]": asked[1]})
            assert values, variable["name"]
            found[variable["name"]] = values[0]
    return found


def test_every_panel_of_the_dashboard_has_data(tmp_path: Path) -> None:
    make_shards(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(loop_config(tmp_path)))
    port = free_port()
    written = write_monitoring([run], tmp_path / "monitoring", port=port, scrape_seconds=1)
    dashboard = json.loads((tmp_path / "monitoring" / "grafana" / "dashboards" / "modsquad.json").read_text())
    with training(tmp_path), running_prometheus(written.prometheus, tmp_path / "data", port) as server:
        wait_until(lambda: len(server.query("up == 1")) == 2, 60, "both ranks answer")
        wait_until(lambda: bool(server.query("modsquad_images_total > 40")), 60, "ten steps")
        wait_until(lambda: bool(server.query(f"rate(modsquad_pairs_total[{WINDOW}]) > 0")), 30, "two scrapes")
        variables = resolve_variables(server, dashboard)
        assert variables["run"] == "run"
        queries = [
            (panel["title"], target["expr"]) for panel in panels(dashboard) for target in panel.get("targets", [])
        ]
        assert len(queries) > 20
        empty = [title for title, expression in queries if not server.query(fill_in(expression, variables))]
        assert empty == []
        shares = server.query(fill_in(dict(queries)["Share of each task's choices"], variables))
        assert len({series["metric"]["task"] for series in shares}) == 4

        rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
        assert rules
        assert {rule["health"] for rule in rules} == {"ok"}
    assert list((run / "targets").iterdir()) == []


def test_prometheus_accepts_the_configuration_of_several_runs(tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "with spaces #2"]
    for run in runs:
        run.mkdir()
        (run / "config.yaml").write_text(dump_config(loop_config(tmp_path)))
    assert_accepts(write_monitoring(runs, tmp_path / "monitoring").prometheus)


@pytest.mark.parametrize("name", ["[/x] y", "a[b-c]?\\d"])
def test_the_name_of_a_run_is_no_pattern(tmp_path: Path, name: str) -> None:
    run = tmp_path / name
    write_target(run, "127.0.0.1:1")
    port = free_port()
    written = write_monitoring([run], run / "monitoring", port=port, scrape_seconds=1)
    shown = [shlex.split(command) for command in written.commands(port)]
    assert shown[0][1] == f"--config.file={written.prometheus}"
    assert shown[1][0] == f"GF_PATHS_PROVISIONING={written.provisioning}"
    with running_prometheus(written.prometheus, tmp_path / "data", port) as server:
        wait_until(lambda: bool(server.get("targets")["activeTargets"]), 30, "the announcement is found")
        assert server.get("rules")["groups"]


def test_a_path_that_prometheus_refuses_is_named(tmp_path: Path) -> None:
    write_target(tmp_path / "a*b" / "run", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"Prometheus takes no path with a '\*', as .*/a\*b/run/targets has one"):
        write_monitoring([tmp_path / "a*b" / "run"], tmp_path / "monitoring")


def write_target(run: Path, address: str) -> None:
    (run / "targets").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(RunConfig()))
    group = {"targets": [address], "labels": {"run": "run", "rank": "0", "node": "here"}}
    (run / "targets" / "rank_00000.json").write_text(json.dumps([group]))


def test_dashboard_panels_have_names_descriptions_and_room(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(loop_config(tmp_path)))
    write_monitoring([run], tmp_path)
    dashboard = json.loads((tmp_path / "grafana" / "dashboards" / "modsquad.json").read_text())
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in panels(dashboard):
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} overlaps another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_a_folder_that_serves_no_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        write_monitoring([tmp_path], tmp_path / "monitoring")
    (tmp_path / "config.yaml").write_text(dump_config(loop_config(tmp_path, "telemetry.port=null")))
    with pytest.raises(UserError, match="serves no metrics"):
        write_monitoring([tmp_path], tmp_path / "monitoring")
