"""Alerts fire when they should and say where to read on."""

import re
import shutil
import subprocess
from pathlib import Path

import yaml

from tests.services.programs import need_programs

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "docker" / "alerts.yml"


def test_every_alert_fires_when_it_should(tmp_path: Path) -> None:
    need_programs({"promtool": "prometheus"})
    for path in (ALERTS, ROOT / "tests" / "docker" / "alerts_test.yml"):
        shutil.copy(path, tmp_path)
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_both_ways() -> None:
    names = {rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    tests = yaml.safe_load((ROOT / "tests" / "docker" / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if "exp_alerts" in case} == names
    assert {case["alertname"] for case in cases if "exp_alerts" not in case} == names


def test_every_alert_has_a_line_on_what_to_do() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text()
    for name in re.findall(r"alert: (\w+)", ALERTS.read_text()):
        assert re.search(rf"^\| `{name}` \| .{{20,}}", operations, re.MULTILINE), f"{name} is not in docs/operations.md"
