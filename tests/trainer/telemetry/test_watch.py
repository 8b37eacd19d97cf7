"""The live view in the terminal, of a run that trains and of one that has ended."""

import io
import json
import socket
import socketserver
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from cluster.env import RankEnv
from configs.errors import UserError
from configs.load import dump_config
from tests.trainer.loop_run import loop_config, make_shards
from tests.trainer.run_folder import STEPS as STEPS_WRITTEN
from tests.trainer.run_folder import run_config, write_lines_of_grown_batch, write_run_folder
from trainer.engine import close_distributed
from trainer.loop import Trainer
from trainer.telemetry.run_progress import describe_seconds, read_progress
from trainer.telemetry.watch import draw, watch

STEPS = 4


def text_of(picture: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(picture)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Watcher:
    """Draws the run after every step."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.drawn: list[str] = []

    def on_start(self, step: int, steps: int) -> None:
        self.drawn.append(text_of(draw(self.run_dir)))

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.drawn.append(text_of(draw(self.run_dir)))

    def on_note(self, text: str) -> None: ...

    def on_end(self) -> None: ...


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watcher:
    folder = tmp_path_factory.mktemp("watched")
    make_shards(folder)
    # Written within the step: what is drawn does not depend on when a save in the background ends.
    config = loop_config(folder, f"train.steps={STEPS}", "checkpoint.every_steps=2", "checkpoint.async_save=false")
    watcher = Watcher(Path(config.run_dir))
    Trainer(config, RankEnv(), watcher).fit()
    close_distributed()
    return watcher


def test_a_run_that_trains_shows_losses_and_loads_of_its_latest_steps(watched: Watcher) -> None:
    at_start, *_, last = watched.drawn
    assert "step 0/4" in at_start
    assert "load of each expert" not in at_start
    assert "step 4/4, done" in last
    assert "checkpoint of step 2" in last
    assert "(since the line before)" in last
    rows = [line.split() for line in last.splitlines()]
    assert {" ".join(row[:2]) for row in rows if row and row[0] in "01"} == {
        "0 attention",
        "0 mlp",
        "1 attention",
        "1 mlp",
    }
    losses = {row[0]: row[1] for row in rows if row and row[0] in ("normal", "depth_euclidean", "keypoints2d")}
    line = read_progress(watched.run_dir).line
    assert line is not None
    assert losses == {task: f"{line.task_loss[task]:.4f}" for task in losses}
    assert len(losses) == 3


def test_a_run_that_has_ended_shows_the_loads_of_its_evaluation(watched: Watcher) -> None:
    shown = text_of(draw(watched.run_dir))
    assert "(evaluation of step 4)" in shown
    console = Console(file=io.StringIO(), width=200)
    watch(watched.run_dir, refresh_seconds=60.0, console=console)  # returns, as there is nothing to wait for
    assert isinstance(console.file, io.StringIO)
    assert "step 4/4" in console.file.getvalue()


def test_progress_of_a_run(watched: Watcher) -> None:
    progress = read_progress(watched.run_dir)
    assert (progress.step, progress.steps, progress.checkpoint_step) == (STEPS, STEPS, STEPS)
    assert progress.seconds_left == 0
    assert progress.images_per_second is not None
    assert progress.images_per_second > 0


def test_speed_is_that_of_the_latest_line(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run")
    write_lines_of_grown_batch(run)
    assert read_progress(run).images_per_second == 128
    (run / "config.yaml").write_text(dump_config(run_config(run)))  # as after a start that has not logged yet
    assert read_progress(run).images_per_second == 128


LOADS = """# TYPE modsquad_expert_load_ratio gauge
modsquad_expert_load_ratio{layer="1",kind="mlp",expert="0"} 1.5
modsquad_expert_load_ratio{layer="1",kind="mlp",expert="1"} 0.5
"""
OWN = '# TYPE modsquad_run_info gauge\nmodsquad_run_info{name="run"} 1.0\n'
HEAD = b"HTTP/1.0 200 OK\r\n\r\n"
ANSWERS = {
    "its own": (HEAD + (LOADS + OWN).encode(), True),
    "another run": (HEAD + (LOADS + OWN.replace('run"', 'other"')).encode(), False),
    "a run that does not say which": (HEAD + LOADS.encode(), False),
    "not yet a line": (HEAD + OWN.encode(), False),
    "labels are missing": (HEAD + (OWN + LOADS).replace("kind", "mind").encode(), False),
    "a page": (HEAD + b"<html><a href=x>hello there</a>\n", False),
    "bytes": (HEAD + bytes(range(256)), False),
    "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n", False),
    "cut short": (b"HTTP/1.0 200 OK\r\nContent-Length: 999\r\n\r\n" + (LOADS + OWN).encode(), False),
    "nothing": (b"", False),
}


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """Answer whatever is asked on a port of the loopback interface."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def announce(run: Path, port: int, node: str) -> None:
    group = {"targets": [f"127.0.0.1:{port}"], "labels": {"run": "run", "rank": "0", "node": node}}
    (run / "targets").mkdir(exist_ok=True)
    (run / "targets" / "rank_00000.json").write_text(json.dumps([group]))


@pytest.mark.parametrize(("answer", "is_taken"), ANSWERS.values(), ids=ANSWERS)
def test_only_the_run_itself_is_believed(tmp_path: Path, answer: bytes, is_taken: bool) -> None:
    run = write_run_folder(tmp_path / "run")
    with answering(answer) as port:
        announce(run, port, socket.gethostname())
        shown = text_of(draw(run))
    assert ("(since the line before)" in shown, f"(evaluation of step {STEPS_WRITTEN})" in shown) == (
        is_taken,
        not is_taken,
    )


def test_a_loopback_address_of_another_machine_is_not_asked(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run")
    with answering(ANSWERS["its own"][0]) as port:
        announce(run, port, "elsewhere")
        assert f"(evaluation of step {STEPS_WRITTEN})" in text_of(draw(run))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        draw(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (42.4, "42 s"), (600, "10 min"), (12_000, "3 h 20 min"), (190_000, "2 d 5 h")],
)
def test_spans_of_time_read_as_people_say_them(seconds: float | None, text: str) -> None:
    assert describe_seconds(seconds) == text
