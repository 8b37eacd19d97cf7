"""The container files, without a Docker engine: lint, and that what they name is there and fits together."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from configs.launch import PROFILES
from configs.load import load_config, recipe_names
from tests.services.prometheus import assert_accepts
from trainer.telemetry.prometheus import TARGETS

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
MONITORING = ROOT / "trainer" / "telemetry" / "monitoring"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    return services


def test_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_gets_all_that_the_package_is_made_of() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == kept
    assert {"configs", "model", "data_pipeline", "cluster", "trainer", "pyproject.toml"} <= sources
    assert all((ROOT / source).exists() for source in sources)


def test_the_installed_package_holds_recipes_profiles_and_monitoring(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, "."], cwd=copied(tmp_path / "source"), check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        assert archive.read("trainer/telemetry/monitoring/alerts.yml") == (DOCKER / "alerts.yml").read_bytes()
    assert {f"configs/{name}.yaml" for name in recipe_names()} <= held
    assert {f"configs/slurm/{path.name}" for path in PROFILES.glob("*.yaml")} <= held
    assert {f"trainer/telemetry/monitoring/{path.name}" for path in MONITORING.iterdir()} <= held


def copied(folder: Path) -> Path:
    """Return a copy of what the image is built from: building leaves files beside the sources."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    folder.mkdir()
    subprocess.run(["cp", "--archive", *(ROOT / name for name in kept), folder], check=True)
    return folder


def test_compose_mounts_what_is_there(compose: dict[str, Any]) -> None:
    mounts = [mount for service in compose.values() for mount in service.get("volumes", []) if mount.startswith(".")]
    assert len(mounts) == 4
    for mount in mounts:
        assert (DOCKER / mount.partition(":")[0]).exists(), mount


def test_compose_opens_ports_to_this_machine_alone(compose: dict[str, Any]) -> None:
    ports = [port for service in compose.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_prometheus_finds_the_trainer(compose: dict[str, Any]) -> None:
    trainer = compose["trainer"]
    assert trainer["hostname"] == "trainer", "ranks announce themselves by the name of their host"
    verb, option, run, *overrides = trainer["command"]
    assert (verb, option) == ("quickstart", "--out")
    assert load_config("quickstart", overrides).telemetry.address == "0.0.0.0"
    (discovery,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"][0]["file_sd_configs"]
    (watched,) = discovery["files"]
    announced = f"{run}/{TARGETS}/rank_*.json"
    assert place_in_runs(trainer, announced) == place_in_runs(compose["prometheus"], watched)


def place_in_runs(service: dict[str, Any], path: str) -> str:
    """Return where a path of the service lies in the volume of runs."""
    mount = next(mount for mount in service["volumes"] if mount.startswith("runs:"))
    place = mount.split(":")[1]
    return str(PurePosixPath(path).relative_to(place))


def test_prometheus_accepts_its_configuration() -> None:
    assert_accepts(DOCKER / "prometheus.yml")


def test_grafana_is_provisioned(compose: dict[str, Any]) -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "modsquad.yml").read_text())["providers"]
    targets = [mount.split(":")[1] for mount in compose["grafana"]["volumes"]]
    assert provider["options"]["path"] in targets
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    assert os.path.basename(compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]) in [
        path.name for path in (DOCKER / "grafana" / "dashboards").iterdir()
    ]
