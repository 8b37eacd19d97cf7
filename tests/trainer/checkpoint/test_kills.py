"""A save is killed before every single thing that it does to files; what was good before stays good."""

import itertools
import os
import signal
import sys
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cluster.env import RankEnv, free_port
from tests.trainer.worlds import Case, engine_on, world_of_one
from trainer.checkpoint.reading import load_latest
from trainer.checkpoint.saving import save
from trainer.distributed.process_groups import join_world

pytestmark = pytest.mark.faults

LOST = 3  # status of a rank that has lost the other
AT_ONCE = 8
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
forks = get_context("forkserver")  # imports once for all
forks.set_forkserver_preload(["tests.trainer.worlds"])


class FileChanges:
    """Counts what this process does to files under a folder, and kills it before the `fatal`-th time (from 1)."""

    def __init__(self, folder: Path, fatal: int) -> None:
        self._folder, self._fatal, self._numbers, self.count = str(folder), fatal, itertools.count(1), 0

    def __enter__(self) -> "FileChanges":
        self._sync = mock.patch("os.fsync", self._on_sync(os.fsync))
        self._sync.start()
        sys.addaudithook(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        self._folder = "\0"  # no path begins so: a hook stays for good
        self._sync.stop()

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(args[0]).startswith(self._folder):
            self._on_change()

    def _on_sync(self, real: Any) -> Any:
        def sync(descriptor: int) -> None:
            self._on_change()
            real(descriptor)

        return sync

    def _on_change(self) -> None:
        self.count = next(self._numbers)
        if self.count == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def save_twice(rank: int, world: int, port: int, run_dir: Path, victim: int, fatal: int, counts: Any = None) -> None:
    """Save step 1; then step 2, during which rank `victim` dies before the `fatal`-th change of its files."""
    join_world(RankEnv(rank=rank, world=world, local_rank=rank, master_port=port), 60.0)
    engine = engine_on(rank, world, Case(1, 1))
    save(run_dir, engine, step=1, state={"step": 1}, keep_last=1)
    try:
        with FileChanges(run_dir, fatal if rank == victim else 0) as changes:
            save(run_dir, engine, step=2, state={"step": 2}, keep_last=1)
    except RuntimeError as error:
        os._exit(LOST if "Connection" in str(error) else 1)
    if rank == victim:
        counts.put(changes.count)
    os._exit(0)


def start(world: int, run_dir: Path, victim: int, fatal: int, counts: Any = None) -> list[BaseProcess]:
    port = free_port()
    ranks = [
        forks.Process(target=save_twice, args=(rank, world, port, run_dir, victim, fatal, counts))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks


def end(ranks: list[BaseProcess]) -> list[int | None]:
    for process in ranks:
        process.join(60)
        process.kill()
    return [process.exitcode for process in ranks]


@pytest.mark.parametrize(("world", "victim"), [(1, 0), (2, 1)])
def test_the_last_good_checkpoint_survives_a_kill_before_every_change(world: int, victim: int, tmp_path: Path) -> None:
    with forks.Manager() as manager:
        counts = manager.Queue()
        assert end(start(world, tmp_path / "whole", victim, 0, counts)) == [0] * world
        changes = counts.get()
    assert changes > (25 if victim == 0 else 2), "the hook sees what a save does"

    steps = []
    with world_of_one():
        engine = engine_on(0, 1, Case(1, 1))
        for first in range(1, changes + 1, AT_ONCE // world):
            some = range(first, min(first + AT_ONCE // world, changes + 1))
            started = [start(world, tmp_path / str(fatal), victim, fatal) for fatal in some]
            for fatal, ranks in zip(some, started, strict=True):
                run_dir = tmp_path / str(fatal)
                codes = end(ranks)
                assert codes.pop(victim) == -signal.SIGKILL
                assert codes in ([], [LOST], [0]), "the other ends; well, where the victim had agreed to all before"
                restored = load_latest(run_dir, engine)
                assert restored is not None
                assert restored.damaged == ()
                assert restored.state == {"step": restored.step}
                steps.append(restored.step)
                save(run_dir, engine, step=3, state={}, keep_last=1)
                left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
                assert left == ["latest", "step_00000003"], "what the killed save left is swept out"
        engine.close()
    assert steps == sorted(steps), "step 1 until `latest` has moved, then step 2"
    assert steps[0] == 1
    if victim == 0:
        assert steps[-1] == 2
