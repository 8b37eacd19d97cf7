"""Files that let Prometheus watch runs, alert on them and draw them in Grafana.

The same files as those of the compose file in `docker/`, with the paths of the runs instead of a container's.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from configs.atomic import write_text_atomically
from configs.errors import UserError
from trainer.run_files import read_config
from trainer.telemetry.prometheus import TARGETS

_SHIPPED = files("trainer.telemetry") / "monitoring"


@dataclass(frozen=True)
class Monitoring:
    """Where the files are.

    Attributes:
        prometheus: configuration of Prometheus; the alerts lie beside it.
        provisioning: Grafana's provisioning folder: data source and dashboard.
    """

    prometheus: Path
    provisioning: Path

    def commands(self, port: int) -> tuple[str, ...]:
        """Return the shell's commands that start Prometheus on `port` of this machine, and Grafana."""
        storage = self.prometheus.parent / "prometheus-data"
        options = (
            f"--config.file={self.prometheus}",
            f"--storage.tsdb.path={storage}",
            f"--web.listen-address=127.0.0.1:{port}",
        )
        return (
            shlex.join(["prometheus", *options]),
            f"GF_PATHS_PROVISIONING={shlex.quote(str(self.provisioning))} grafana server",
        )


def write_monitoring(runs: Sequence[Path], out: Path, *, port: int = 9090, scrape_seconds: int = 15) -> Monitoring:
    """Write everything into `out`.

    Args:
        runs: run folders; they may be training, or not yet.
        out: folder to write into.
        port: where Prometheus will listen, for Grafana.
        scrape_seconds: between two scrapes, and between two evaluations of the alerts.

    Raises:
        UserError: a folder is no run, serves no metrics, or has a path that Prometheus does not take; or `out` cannot
            be written.
    """
    for run in runs:
        if read_config(run).telemetry.port is None:
            raise UserError(f"{run} serves no metrics: train it with telemetry.port=0, or another port")
    out = out.resolve()
    config = yaml.safe_load(_shipped("prometheus.yml"))
    config["global"] = dict.fromkeys(config["global"], f"{scrape_seconds}s")
    config["rule_files"] = [f"{_literally(out)}/alerts.yml"]
    (scrape,) = config["scrape_configs"]
    (discovery,) = scrape["file_sd_configs"]
    discovery["files"] = [f"{_literally(run.resolve() / TARGETS)}/rank_*.json" for run in runs]
    discovery["refresh_interval"] = f"{scrape_seconds}s"

    source = yaml.safe_load(_shipped("datasource.yml"))
    source["datasources"][0]["url"] = f"http://127.0.0.1:{port}"
    dashboards = yaml.safe_load(_shipped("dashboards.yml"))
    grafana = out / "grafana"
    dashboards["providers"][0]["options"]["path"] = str(grafana / "dashboards")

    for path, text in (
        (out / "prometheus.yml", yaml.safe_dump(config, sort_keys=False)),
        (out / "alerts.yml", _shipped("alerts.yml")),
        (grafana / "provisioning" / "datasources" / "prometheus.yml", yaml.safe_dump(source, sort_keys=False)),
        (grafana / "provisioning" / "dashboards" / "modsquad.yml", yaml.safe_dump(dashboards, sort_keys=False)),
        (grafana / "dashboards" / "modsquad.json", _shipped("dashboard.json")),
    ):
        write_text_atomically(path, text)
    return Monitoring(out / "prometheus.yml", grafana / "provisioning")


def _literally(folder: Path) -> str:
    """Return a path for Prometheus, which takes it as a pattern.

    Raises:
        UserError: there is an asterisk in it, which Prometheus allows in names of files alone, escaped or not.
    """
    if "*" in str(folder):
        raise UserError(f"Prometheus takes no path with a '*', as {folder} has one: rename that folder")
    return re.sub(r"([\\\[?])", r"\\\1", str(folder))


def _shipped(name: str) -> str:
    return (_SHIPPED / name).read_text(encoding="utf-8")
