"""A real Prometheus on a free port of the loopback interface."""

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.services.programs import need_programs
from tests.services.waiting import wait_until


class Prometheus:
    """Asks a server that is running."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"

    def get(self, path: str, **query: str) -> Any:
        """Return the data of an answer of the HTTP API; raises RuntimeError with the server's reason."""
        url = f"{self._base}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["error"]) from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an instant query."""
        series: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return series

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._base}/-/ready", timeout=10):
                return True
        except OSError:
            return False


def assert_accepts(config: Path) -> None:
    """Fail with promtool's words where Prometheus would not start with a configuration file."""
    need_programs({"promtool": "prometheus"})
    done = subprocess.run(["promtool", "check", "config", config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def running_prometheus(config: Path, data: Path, port: int) -> Iterator[Prometheus]:
    """Start Prometheus with a configuration file and stop it afterwards."""
    need_programs({"prometheus": "prometheus"})
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={data}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (config.parent / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server = Prometheus(port)
        wait_until(lambda: server.is_ready() or process.poll() is not None, 30, "Prometheus is ready")
        assert process.poll() is None, Path(log.name).read_text()
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)
