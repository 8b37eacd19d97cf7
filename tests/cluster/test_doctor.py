"""The doctor: a healthy machine is healthy, and every ailment is found with its cure."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.doctor import check_machine
from cluster.doctor_ranks import RankFacts, judge
from cluster.doctor_start import check_local_ranks, check_slurm_ranks
from cluster.env import SLURM_PORTS
from tests.fake_gpus import python_path_with_gpus
from tests.services.slurm import running_slurm

ROOT = Path(__file__).parents[2]
TOKEN = "word"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    with running_slurm() as folder:
        yield folder


def verdicts(facts: list[RankFacts]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in judge(facts, TOKEN, Path("/shared/.token"))}


def rank(number: int, node: str, *, token: str | None = TOKEN, clock: float = 0.0, torch: str = "2") -> RankFacts:
    return RankFacts(number, node, (f"torch {torch}",), token, clock)


def test_this_machine_is_fit(tmp_path: Path) -> None:
    findings = {finding.check: finding for finding in check_machine(tmp_path)}
    assert not [finding for finding in findings.values() if finding.verdict == "bad"]
    assert all(finding.advice for finding in findings.values() if finding.verdict != "good")
    assert str(ROOT) in findings["package model"].found


def test_a_package_of_the_same_name_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").touch()
    program = "from cluster.doctor import check_machine; from pathlib import Path\n" + (
        "print([f'{x.verdict}: {x.found}' for x in check_machine(Path('.')) if x.check == 'package model'])"
    )
    # The foreign folder comes first, as that which a program is started from does.
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == f"['bad: imported from {tmp_path}/model']"


def test_a_folder_that_cannot_be_written_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    findings = {finding.check: finding for finding in check_machine(tmp_path / "not" / "there")}
    assert findings["space for runs"].verdict == "bad"
    assert str(tmp_path) in findings["space for runs"].found


def test_a_host_name_that_does_not_resolve_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    findings = {finding.check: finding for finding in check_machine(tmp_path)}
    assert findings["host name"].verdict == "warning"
    assert "GLOO_SOCKET_IFNAME" in findings["host name"].advice


def test_ranks_of_this_machine_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").write_text("raise RuntimeError('not this program')")
    monkeypatch.chdir(tmp_path)
    findings = {finding.check: finding for finding in check_local_ranks(tmp_path / "runs", 2)}
    assert {finding.verdict for finding in findings.values()} == {"good"}
    assert findings["ranks"].found == f"2 met on {socket.gethostname()} (2)"
    assert "GB/s sent by each of 2 ranks" in findings["all-to-all"].found
    assert re.fullmatch(rf"{socket.gethostname()}:\d+ is free, and all 2 ranks reach it", findings["port"].found)
    assert list((tmp_path / "runs").iterdir()) == []


def test_ranks_that_share_a_gpu_exchange_by_gloo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path_with_gpus(tmp_path / "site", 1))
    findings = {finding.check: finding for finding in check_local_ranks(tmp_path / "runs", 2)}
    assert {finding.verdict for finding in findings.values()} == {"good"}
    assert findings["all-to-all"].found.endswith("(gloo)")


def test_ranks_of_two_slurm_nodes_meet(slurm: Path, tmp_path: Path) -> None:
    findings = {
        finding.check: finding for finding in check_slurm_ranks(tmp_path, nodes=2, partition="normal", minutes=2)
    }
    assert {finding.verdict for finding in findings.values()} == {"good"}, findings
    assert "normal" in findings["SLURM"].found
    assert findings["ranks"].found.startswith("2 met")
    port = re.search(r":(\d+) is free, and all 2 ranks reach it; each job takes its own of", findings["port"].found)
    assert port is not None
    assert int(port[1]) in SLURM_PORTS


def test_a_rank_for_every_gpu_that_is_asked_for(slurm: Path, tmp_path: Path) -> None:
    found = check_slurm_ranks(tmp_path, nodes=2, partition="normal", minutes=2, gpus_per_node=2)
    assert {finding.check: finding for finding in found}["ranks"].found.startswith("4 met")
    *_, last = check_slurm_ranks(tmp_path, nodes=1, partition="normal", minutes=1, gpus_per_node=3)
    assert last.verdict == "bad"


def test_a_port_that_is_taken_on_the_first_node_is_found_out(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        _, *found = check_slurm_ranks(tmp_path, nodes=2, partition="normal", minutes=2)
    (finding,) = found
    assert (finding.check, finding.verdict) == ("port", "bad")
    assert finding.found == f"{socket.gethostname()}:{os.environ['MASTER_PORT']}: Address already in use"


def test_what_slurm_refuses_is_told_in_its_words(slurm: Path, tmp_path: Path) -> None:
    *_, last = check_slurm_ranks(tmp_path, nodes=1, partition="nowhere", minutes=1)
    assert last.verdict == "bad"
    assert "partition" in last.found


def test_what_ranks_disagree_in_is_named() -> None:
    assert set(verdicts([rank(0, "a"), rank(1, "b", clock=0.2)]).values()) == {"good"}
    assert verdicts([rank(0, "a"), rank(1, "b", token=None)])["shared folder"] == "bad"
    assert verdicts([rank(0, "a"), rank(1, "b", token="other")])["shared folder"] == "bad"
    assert verdicts([rank(0, "a"), rank(1, "b"), rank(2, "c", clock=-30.0)])["clocks"] == "warning"
    assert verdicts([rank(0, "a"), rank(1, "b", torch="1")])["versions"] == "bad"
