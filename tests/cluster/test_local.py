"""The local launcher, with real processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.cpu import usable_cores
from cluster.exit_status import LOST_STATUS
from cluster.local import run_ranks
from configs.errors import UserError

PRINT_RANK = "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'])"


def test_every_rank_runs_and_all_but_the_first_log_to_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks([sys.executable, "-c", PRINT_RANK], 3, tmp_path) == 0
    assert capfd.readouterr().out.startswith("0 3 ")
    assert (tmp_path / "rank_2.log").read_text().startswith("2 3 ")


def test_ranks_import_this_program_and_not_what_lies_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").write_text("raise RuntimeError('not this program')")
    monkeypatch.chdir(tmp_path)
    assert run_ranks([sys.executable, "-m", "cluster.env"], 1, tmp_path / "logs") == 0


def test_one_failure_stops_the_others_and_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = "import os, sys, time; sys.exit('no such shard') if os.environ['RANK'] == '1' else time.sleep(60)"
    start = time.monotonic()
    assert run_ranks([sys.executable, "-c", program], 2, tmp_path) == 1
    assert time.monotonic() - start < 30
    assert "rank 1: no such shard" in capfd.readouterr().err


def test_a_clear_error_wins_over_a_lost_peer(tmp_path: Path) -> None:
    program = "import os, sys, time; r = int(os.environ['RANK']); time.sleep(0.3 * r); sys.exit(1 + r)"
    assert run_ranks([sys.executable, "-c", program], 2, tmp_path) == 2


def test_a_fault_of_one_rank_wins_over_those_that_lost_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import os, sys, time; time.sleep(0.5 * int(os.environ['RANK']));"
        f"sys.exit('a fault' if os.environ['RANK'] == '1' else {LOST_STATUS})"
    )
    assert run_ranks([sys.executable, "-c", program], 2, tmp_path) == 1
    assert "rank 1: a fault" in capfd.readouterr().err


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_before_those_that_lost_it(
    killed: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = (
        "import os, sys, time; r = int(os.environ['RANK']);"
        f"os.kill(os.getpid(), 9) if r == {killed} else (time.sleep(0.3 * r), sys.exit('lost a peer'))"
    )
    assert run_ranks([sys.executable, "-c", program], 2, tmp_path) == 128 + signal.SIGKILL
    assert f"rank {killed} was ended by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("says", "status", "told"),
    [
        ("error: no shard", 2, 2),
        ("interrupted by SIGTERM; saved", 143, 143),
        ("interrupted by SIGTERM; saved", 143, 130),  # Ctrl-C
    ],
)
def test_what_another_rank_says_for_all_reaches_the_terminal(
    says: str, status: int, told: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = (
        "import os, sys, time; r = int(os.environ['RANK']);"
        f"r and print({says!r}, flush=True);"
        f"{told} == 130 and r and os.kill(os.getppid(), 2);"
        f"sys.exit({status})"
    )
    assert run_ranks([sys.executable, "-c", program], 2, tmp_path) == told
    assert capfd.readouterr() == ("", f"{says}\n")


def test_ranks_share_the_cores_unless_the_user_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_ranks([sys.executable, "-c", PRINT_RANK], 2, tmp_path) == 0
    assert (tmp_path / "rank_1.log").read_text() == f"1 2 {max(1, usable_cores() // 2)}\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_ranks([sys.executable, "-c", PRINT_RANK], 2, tmp_path) == 0
    assert (tmp_path / "rank_1.log").read_text() == "1 2 7\n"


def test_a_command_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-program: No such file"):
        run_ranks([str(tmp_path / "no-such-program")], 2, tmp_path)


RANK_THAT_STOPS = (
    "import os, signal, sys, time; from pathlib import Path;"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit({on_term}));"
    "signal.signal(signal.SIGINT, signal.SIG_IGN);"
    "Path({folder!r}, os.environ['RANK']).write_text(str(os.getpid())); time.sleep(60)"
)


def launch(rank_program: str, folder: Path) -> subprocess.Popen[str]:
    """Start a launcher of two ranks, each of which writes its process id to a file named by its number."""
    program = (
        "import sys; from pathlib import Path; from cluster.local import run_ranks;"
        f"sys.exit(run_ranks([sys.executable, '-c', {rank_program!r}], 2, Path({str(folder)!r})))"
    )
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("number", "on_term", "status"),
    [
        (signal.SIGINT, "143", 130),
        (signal.SIGTERM, "143", 143),
        (signal.SIGUSR2, "143", 140),
        (signal.SIGINT, "0", 130),  # it had just finished; what the launcher does next is stopped all the same
        (signal.SIGTERM, "2", 2),  # no space for the checkpoint, say
    ],
)
def test_a_signal_to_the_launcher_alone_stops_the_ranks(number: int, on_term: str, status: int, tmp_path: Path) -> None:
    launcher = launch(RANK_THAT_STOPS.format(on_term=on_term, folder=str(tmp_path)), tmp_path)
    pids = [_read_pid(tmp_path / name) for name in ("0", "1")]
    launcher.send_signal(number)
    assert launcher.wait(30) == status
    assert not any(map(_alive, pids))


def test_a_second_ctrl_c_kills_ranks_that_do_not_stop(tmp_path: Path) -> None:
    lingers = "Path({folder!r}, os.environ['RANK'] + '.told').write_text('1') and time.sleep(60)"
    program = RANK_THAT_STOPS.replace("{on_term}", lingers)
    launcher = launch(program.format(folder=str(tmp_path)), tmp_path)
    pids = [_read_pid(tmp_path / name) for name in ("0", "1")]
    launcher.send_signal(signal.SIGINT)
    _wait_until(lambda: all((tmp_path / f"{rank}.told").exists() for rank in (0, 1)))
    launcher.send_signal(signal.SIGINT)
    _, complaints = launcher.communicate(timeout=30)
    assert (launcher.returncode, complaints) == (130, "")
    assert not any(map(_alive, pids))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="relies on PR_SET_PDEATHSIG of Linux")
def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    rank = (
        "import os, time; from pathlib import Path; from cluster.local import die_with_launcher; die_with_launcher();"
        f"Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid())); time.sleep(60)"
    )
    launcher = launch(rank, tmp_path)
    pids = [_read_pid(tmp_path / name) for name in ("0", "1")]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    _wait_until(lambda: not any(map(_alive, pids)))


def _read_pid(path: Path) -> int:
    _wait_until(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def _wait_until(condition: object, seconds: float = 30.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_with_a_report_the_terminal_stays_empty(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    assert run_ranks([sys.executable, "-c", "import sys; sys.exit('no shard')"], 1, tmp_path, report=heard.append) == 1
    assert heard == [f"rank 0: no shard (all of it: {tmp_path / 'rank_0.log'})"]
    assert capfd.readouterr() == ("", "")
