"""Runs the engine and its checkpoints on worlds of one, two and four ranks, once for all tests.

Starting ranks takes longer than all they do here, so everything that needs two (four) ranks runs in one start.
"""

import atexit
import errno
import functools
import itertools
import math
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cluster.env import RankEnv
from cluster.groups import Layout
from configs.errors import UserError
from configs.schema import CheckpointConfig
from model.dispatch import ExpertGroup
from tests.ranks import run_ranks
from tests.trainer.squad_model import SquadLoss, squad_batches
from tests.trainer.toy_model import ToyModel, toy_batches, toy_config
from trainer.checkpoint.files import FileEntry, describe_file
from trainer.checkpoint.reading import load_latest
from trainer.checkpoint.saving import CheckpointSaver, save
from trainer.distributed.process_groups import create_groups
from trainer.engine import Engine, StepOutcome, close_distributed, expert_group, init_distributed

STEPS, SAMPLES, LEARNING_RATE = 4, 16, 0.03
CLIPS = (0.0, 0.05)  # the gradient's norm is between 0.1 and 1


@dataclass(frozen=True)
class Case:
    ep_size: int
    stage: int
    clip_norm: float = 0.0
    accumulation: int = 1
    dtype: str = "fp32"
    recompute: bool = False
    squad: bool = False
    """Train the real model in place of the toy."""

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return squad_batches(STEPS, SAMPLES) if self.squad else toy_batches(STEPS, SAMPLES)

    def model(self, group: ExpertGroup, world: dist.ProcessGroup | None) -> nn.Module:
        return SquadLoss(group, world) if self.squad else ToyModel(group, recompute=self.recompute)


LAYOUTS: dict[int, list[Case]] = {
    1: [Case(1, stage, clip, turns) for stage in (0, 1, 2) for clip, turns in ((CLIPS[0], 2), (CLIPS[1], 1))],
    2: [
        *(Case(1, stage, CLIPS[1], 2) for stage in (0, 1, 2)),
        *(Case(2, stage, clip, turns) for stage in (0, 1, 2) for clip, turns in ((CLIPS[0], 1), (CLIPS[1], 2))),
        *(Case(2, stage, CLIPS[1], 2, recompute=True) for stage in (0, 1, 2)),
        *(Case(ep_size, stage, CLIPS[1], squad=True) for ep_size in (1, 2) for stage in (0, 1, 2)),
    ],
    4: [
        *(Case(2, stage, clip, 2) for stage in (0, 1, 2) for clip in CLIPS),
        *(Case(2, stage, CLIPS[1], squad=True) for stage in (0, 1, 2)),
    ],
}


BFLOAT16 = [Case(2, stage, CLIPS[1], dtype="bf16", squad=squad) for stage in (0, 1, 2) for squad in (False, True)]
SPOILED = [Case(2, stage) for stage in (0, 1, 2)]
BATCHES = toy_batches(STEPS, SAMPLES)
LOOP_STATE = {"cursor": {"position": 7}, "ema": [torch.arange(3.0), None], "rng": torch.arange(9, dtype=torch.uint8)}
SAME_LAYOUT = [Case(2, 0), Case(2, 1), Case(2, 2), Case(1, 1), Case(2, 0, dtype="bf16"), Case(2, 1, dtype="bf16")]
WRITER = Case(2, 1, clip_norm=0.05)  # on four ranks
READERS = [Case(2, 2, clip_norm=0.05), Case(1, 0, clip_norm=0.05), Case(2, 0, clip_norm=0.05)]  # on two


@dataclass(frozen=True)
class Launched:
    """Results of every rank; `folder` holds the run folders."""

    folder: Path
    four_ranks: list[dict[str, Any]]
    two_ranks: list[dict[str, Any]]


@functools.cache
def launched() -> Launched:
    folder = Path(tempfile.mkdtemp(prefix="modsquad_engine_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    four_ranks = run_ranks(on_four_ranks, 4, folder / "four", timeout_seconds=140.0)
    with small_disk(folder / "small_disk") as disk:
        two_ranks = run_ranks(on_two_ranks, 2, folder, disk, timeout_seconds=140.0)
    return Launched(folder, four_ranks, two_ranks)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of 1 MB, or None where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def world_of_one() -> Iterator[None]:
    """Let this process be a world of one, without a launcher; leave nothing behind."""
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            close_distributed()


def on_four_ranks(rank: int, world: int, run_dir: Path) -> dict[str, Any]:
    return {"fp32": train_cases(rank, world, LAYOUTS[4]), "saved": save_and_go_on(rank, world, WRITER, run_dir)}


def on_two_ranks(rank: int, world: int, folder: Path, disk: Path | None) -> dict[str, Any]:
    run_dirs = {case: folder / f"run_{number}" for number, case in enumerate(SAME_LAYOUT)}
    return {
        "fp32": train_cases(rank, world, LAYOUTS[2]),
        "bf16": train_cases(rank, world, BFLOAT16),
        "spoiled": [survive_bad_steps(rank, world, case) for case in SPOILED],
        "saved": [save_and_go_on(rank, world, case, run_dir) for case, run_dir in run_dirs.items()],
        "resumed": [resume(rank, world, case, run_dir) for case, run_dir in run_dirs.items()],
        "resumed_from_four": [resume(rank, world, case, folder / "four") for case in READERS],
        "hang_seconds": wait_in_vain(rank),
        "full_disk": disk and fill_disk(rank, world, disk),
        "unreadable": read_in_vain(rank, world, folder / "unreadable"),
        "background": save_in_background(rank, world, folder / "background"),
    }


def train_cases(rank: int, world: int, cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        engine = engine_on(rank, world, case)
        results.append(train_and_record(engine, rank, world, case))
        engine.close()
    return results


def train_and_record(engine: Engine, rank: int, world: int, case: Case) -> dict[str, Any]:
    losses, norms, gradients = [], [], {}
    for step, batch in enumerate(case.batches()):
        engine.set_learning_rate(LEARNING_RATE)
        loss_sum = torch.zeros(())
        for turn, (x, y) in enumerate(micro_batches(batch, rank, world, case.accumulation)):
            loss, _ = engine(x, y)
            engine.backward(loss)
            loss_sum += loss.detach() / (case.accumulation * world)
            if step == 0 and turn == case.accumulation - 1:
                gradients = engine.full_gradients()
            outcome = engine.step()
        dist.all_reduce(loss_sum)
        losses.append(loss_sum.item())
        norms.append(outcome.gradient_norm)
        assert not outcome.skipped
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "state": whole_state(engine),
    }


def whole_state(engine: Engine) -> dict[str, Tensor]:
    state = engine.logical_state()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def survive_bad_steps(rank: int, world: int, case: Case) -> list[bool]:
    """One good step; then rank 1 spoils a gradient, then a loss alone; nothing may have changed before the next."""
    engine = engine_on(rank, world, case)
    engine.set_learning_rate(LEARNING_RATE)
    good, nan_input, inf_loss, last = toy_batches(4, SAMPLES)
    assert not step_once(engine, good, rank, world).skipped
    before = whole_state(engine)
    spoiled = torch.where(torch.arange(SAMPLES)[:, None] < SAMPLES // 2, nan_input[0], math.nan)
    outcomes = [step_once(engine, (spoiled, nan_input[1]), rank, world)]
    outcomes.append(step_once(engine, inf_loss, rank, world, added_loss=math.inf if rank == 1 else 0.0))
    assert all(outcome.gradient_norm == math.inf for outcome in outcomes)
    after = whole_state(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    outcomes.append(step_once(engine, last, rank, world))
    changed = whole_state(engine)
    assert changed["step"] == 2
    assert not torch.equal(changed["master.first.weight"], before["master.first.weight"])
    engine.close()
    return [outcome.skipped for outcome in outcomes]


def wait_in_vain(rank: int) -> list[float]:
    """Seconds until rank 0 gives up on collectives that rank 1 does not join, in groups with a timeout of 1 s."""
    groups, seconds = create_groups(Layout(2, 2), 1.0), []
    if rank == 0:
        for group in (groups.world, groups.expert):
            started = time.monotonic()
            with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
                dist.all_reduce(torch.zeros(1), group=group)
            seconds.append(time.monotonic() - started)
    dist.barrier()
    return seconds


def step_once(
    engine: Engine, batch: tuple[Tensor, Tensor], rank: int, world: int, added_loss: float = 0.0
) -> StepOutcome:
    ((x, y),) = micro_batches(batch, rank, world, 1)
    engine.backward(engine(x, y)[0] + added_loss)
    return engine.step()


def micro_batches(batch: tuple[Tensor, Tensor], rank: int, world: int, accumulation: int) -> list[list[Tensor]]:
    parts = [tensor.chunk(world * accumulation) for tensor in batch]
    return [[part[turn * world + rank] for part in parts] for turn in range(accumulation)]


def train_on(engine: Engine, batches: list[tuple[Tensor, Tensor]], rank: int, world: int) -> None:
    for batch in batches:
        engine.set_learning_rate(0.03)
        assert not step_once(engine, batch, rank, world).skipped


def fresh(rank: int, world: int, case: Case) -> Engine:
    """An engine whose every number differs from any other's."""
    engine = engine_on(rank, world, case)
    engine.load_logical_state({name: value + torch.rand(()) for name, value in engine.logical_state().items()})
    return engine


def save_and_go_on(rank: int, world: int, case: Case, run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train two steps, save, train two more; return both states."""
    engine = engine_on(rank, world, case)
    train_on(engine, BATCHES[:2], rank, world)
    save(run_dir, engine, step=2, state=LOOP_STATE, keep_last=2)
    saved = whole_state(engine)
    train_on(engine, BATCHES[2:], rank, world)
    done = whole_state(engine)
    engine.close()
    return saved, done


def resume(rank: int, world: int, case: Case, run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load what `save_and_go_on` saved, train the other two steps; return both states."""
    engine = fresh(rank, world, case)
    restored = load_latest(run_dir, engine)
    assert restored is not None
    assert (restored.step, restored.damaged) == (2, ())
    torch.testing.assert_close(restored.state, LOOP_STATE, rtol=0, atol=0)
    loaded = whole_state(engine)
    train_on(engine, BATCHES[2:], rank, world)
    done = whole_state(engine)
    engine.close()
    return loaded, done


def fill_disk(rank: int, world: int, run_dir: Path) -> list[str]:
    """Save once; then fill the disk and try again, with a little more room each time until it is enough."""
    engine = engine_on(rank, world, Case(2, 1))
    save(run_dir, engine, step=1, state={}, keep_last=1)
    free, errors = shutil.disk_usage(run_dir).free, []
    train_on(engine, BATCHES[:1], rank, world)
    for room in itertools.count(4096, 4096):
        if rank == 0:
            (run_dir / "ballast").write_bytes(bytes(free - room))
        try:
            save(run_dir, engine, step=2, state={}, keep_last=1)
        except UserError as error:
            errors.append(str(error))
        else:
            break
        restored = load_latest(run_dir, engine)
        assert restored is not None
        assert (restored.step, restored.damaged) == (1, ())
        if rank == 0:
            assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    engine.close()
    return errors


def read_in_vain(rank: int, world: int, run_dir: Path) -> tuple[str, str]:
    """Save twice; rank 1 cannot read the second one again. Return the error, and the name in `latest`."""
    engine = engine_on(rank, world, Case(2, 1))
    for step in (1, 2):
        save(run_dir, engine, step=step, state={}, keep_last=2)

    def describe(path: Path, real: Callable[[Path], FileEntry] = describe_file) -> FileEntry:
        if rank == 1 and path.parent.name == "step_00000002":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    with mock.patch("trainer.checkpoint.files.describe_file", describe), pytest.raises(UserError) as caught:
        load_latest(run_dir, engine)
    engine.close()
    return str(caught.value), (run_dir / "checkpoints" / "latest").read_text()


def save_in_background(rank: int, world: int, run_dir: Path) -> dict[str, Any]:
    """Train on while rank 1 writes slowly; then let it find no space."""
    engine, told = engine_on(rank, world, Case(2, 1)), []
    saver = CheckpointSaver(run_dir, engine, CheckpointConfig(), lambda: told.append("saved"))
    train_on(engine, BATCHES[:2], rank, world)
    saved, release = whole_state(engine), threading.Event()

    def describe(path: Path, fails: bool, real: Callable[[Path], FileEntry] = describe_file) -> FileEntry:
        if rank == 1:
            release.wait(60)
            if fails:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(path)

    with mock.patch("trainer.checkpoint.saving.describe_file", partial(describe, fails=False)):
        saver.save(2, LOOP_STATE)
        train_on(engine, BATCHES[2:], rank, world)
        saver.check()
        assert not told, "training goes on, nothing is said before all ranks are done"
        assert not (run_dir / "checkpoints" / "latest").exists()
        release.set()
        saver.wait()
    assert told == ["saved"]
    done = whole_state(engine)
    restored = load_latest(run_dir, engine)
    assert restored is not None
    torch.testing.assert_close(restored.state, LOOP_STATE, rtol=0, atol=0)
    loaded = whole_state(engine)
    train_on(engine, BATCHES[2:], rank, world)

    release.clear()
    with mock.patch("trainer.checkpoint.saving.describe_file", partial(describe, fails=True)):
        saver.save(4, LOOP_STATE)
        saver.check()
        release.set()
        dist.barrier()
        with pytest.raises(UserError) as caught:
            check_for_a_while(saver)
    saver.save(5, LOOP_STATE)
    saver.wait()
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    engine.close()
    return {"error": str(caught.value), "saved": saved, "loaded": loaded, "done": done, "names": names}


def check_for_a_while(saver: CheckpointSaver) -> None:
    for _ in range(1000):  # steps
        saver.check()
        time.sleep(0.01)


def engine_on(rank: int, world: int, case: Case) -> Engine:
    parallel = {"ep_size": case.ep_size, "zero_stage": case.stage}
    config = toy_config(optim={"clip_norm": case.clip_norm}, parallel=parallel, train={"dtype": case.dtype})
    init_distributed(RankEnv(rank=rank, world=world, local_rank=rank), config.parallel)
    layout = Layout(world, case.ep_size)
    model = case.model(expert_group(layout), dist.group.WORLD)
    micro_batch = SAMPLES // world // case.accumulation
    return Engine(model, config, layout, accumulation=case.accumulation, micro_batch=micro_batch)
