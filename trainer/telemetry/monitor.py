"""Files that let Prometheus watch runs, alert on them and draw them in Grafana.

The same files as those of the compose file in `docker/`, with the paths of the runs instead of a container's.
"""

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
        """Return the commands that start Prometheus on `port` of this machine, and Grafana."""
        storage = self.prometheus.parent / "prometheus-data"
        return (
            f"prometheus --config.file={self.prometheus} --storage.tsdb.path={storage} "
            f"--web.listen-address=127.0.0.1:{port}",
            f"GF_PATHS_PROVISIONING={self.provisioning} grafana server",
        )


def write_monitoring(runs: Sequence[Path], out: Path, *, port: int = 9090, scrape_seconds: int = 15) -> Monitoring:
    """Write everything into `out`.

    Args:
        runs: run folders; they may be training, or not yet.
        out: folder to write into.
        port: where Prometheus will listen, for Grafana.
        scrape_seconds: between two scrapes, and between two evaluations of the alerts.

    Raises:
        UserError: a folder is no run, serves no metrics, or `out` cannot be written.
    """
    for run in runs:
        if read_config(run).telemetry.port is None:
            raise UserError(f"{run} serves no metrics: train it with telemetry.port=0, or another port")
    out = out.resolve()
    config = yaml.safe_load(_shipped("prometheus.yml"))
    config["global"] = dict.fromkeys(config["global"], f"{scrape_seconds}s")
    (scrape,) = config["scrape_configs"]
    (discovery,) = scrape["file_sd_configs"]
    discovery["files"] = [str(run.resolve() / TARGETS / "rank_*.json") for run in runs]
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


def _shipped(name: str) -> str:
    return (_SHIPPED / name).read_text(encoding="utf-8")
