"""The training loop end to end: any number of ranks, killed and resumed, interrupted, gone bad."""

import gc
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

from cluster.env import RankEnv
from configs.atomic import write_text_atomically
from configs.errors import UserError
from data_pipeline.index import ShardIndex
from data_pipeline.loader import TrainLoader
from data_pipeline.reading import read_batch
from model.routing_stats import RoutingLedger
from tests.ranks import run_ranks
from tests.trainer.loop_run import loop_config, make_shards
from tests.trainer.noted_training import keys_of_steps, train
from tests.trainer.rank_processes import lines_of, start_ranks, wait_for_step
from trainer.checkpoint.reading import read_weights
from trainer.distributed.interruption import Interrupted
from trainer.engine import close_distributed
from trainer.evaluation.constant import Constants
from trainer.evaluation.evaluate import evaluate_run, latest_evaluation
from trainer.loop import Trainer
from trainer.progress import PlainProgress
from trainer.run_files import conflict_path
from trainer.squads.export import load_run_model
from trainer.squads.extraction import extract_tasks

STEPS = 12
LONGER = (f"train.steps={STEPS}", "checkpoint.every_steps=4", "evaluate.every_steps=4", "model.router_noise=true")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on busy cores make tiny models ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def alone() -> Iterator[RankEnv]:
    """One rank in this process."""
    yield RankEnv()
    close_distributed()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards and a whole run of one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_shards(folder)
    train(folder, RankEnv(), *LONGER)
    close_distributed()
    return folder


def link_shards(undisturbed: Path, folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split).symlink_to(undisturbed / split)


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Compare losses, statistics, sample keys and evaluation of every step."""
    lines, wanted = lines_of(run_dir), lines_of(expected)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, wanted, strict=True):
        for key in ("step", "epoch", "images", "pairs", "bad_steps", "learning_rate"):
            assert line[key] == other[key]
        for key in ("loss", "matching_loss", "gradient_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6)
        for key in ("task_loss", "mutual_information"):
            assert line[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6)
    assert keys_of_steps(run_dir) == keys_of_steps(expected)
    for step in (4, 8, STEPS):
        name = f"step_{step:08d}"
        scores, others = (
            json.loads((run / "evaluation" / f"{name}_val.json").read_text()) for run in (run_dir, expected)
        )
        for task, score in scores["tasks"].items():
            assert score["value"] == pytest.approx(others["tasks"][task]["value"], rel=1e-4)
            assert score["constant"] == pytest.approx(others["tasks"][task]["constant"], rel=1e-6)


def test_one_epoch_uses_every_sample_once(undisturbed: Path) -> None:
    index = ShardIndex.load(undisturbed / "train")
    keys = keys_of_steps(undisturbed / "run")
    stream = [key for step in sorted(keys) for key in keys[step]]
    assert len(stream) == 4 * STEPS
    first_steps = len(index) // 4
    assert len(set(stream[: 4 * first_steps])) == 4 * first_steps
    assert set(stream) == set(index.keys)


def test_two_ranks_killed_and_resumed_on_one_equal_one_process_undisturbed(
    undisturbed: Path, tmp_path: Path, alone: RankEnv
) -> None:
    link_shards(undisturbed, tmp_path)
    processes = start_ranks(tmp_path, 2, *LONGER, "parallel.ep_size=2")
    wait_for_step(tmp_path / "run", random.Random().randint(5, 8), processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    killed_after = lines_of(tmp_path / "run")[-1]["step"]
    assert killed_after < STEPS
    train(tmp_path, alone, *LONGER)
    assert_same_run(tmp_path / "run", undisturbed / "run")


def test_two_ranks_killed_and_resumed_equal_two_undisturbed_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    options = (*LONGER, "parallel.ep_size=2")
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
        link_shards(undisturbed, folder)
    whole, killed = folders
    processes = start_ranks(killed, 2, *options)
    wait_for_step(killed / "run", random.Random().randint(5, 8), processes)
    for process in processes:
        process.kill()
        process.wait()
    for folder in folders:
        assert [process.wait(120) for process in start_ranks(folder, 2, *options)] == [0, 0]
    timing = {"step_seconds", "data_wait_seconds", "time"}
    lines, wanted = (
        [{key: value for key, value in line.items() if key not in timing} for line in lines_of(folder / "run")]
        for folder in (killed, whole)
    )
    assert lines == wanted
    assert len(lines) == STEPS
    assert keys_of_steps(killed / "run") == keys_of_steps(whole / "run")


class CtrlC(PlainProgress):
    """Presses Ctrl-C during step 3."""

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        super().on_step(step, metrics)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_at_the_step_boundary_and_the_run_goes_on(
    undisturbed: Path, tmp_path: Path, alone: RankEnv
) -> None:
    link_shards(undisturbed, tmp_path)
    with pytest.raises(Interrupted) as interrupted:
        train(tmp_path, alone, *LONGER, "train.log_every_steps=3", listener=CtrlC(Console(), 4))
    assert interrupted.value.exit_status == 130
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000002"]
    close_distributed()
    train(tmp_path, alone, *LONGER, "train.log_every_steps=3")
    # The first line spans the interruption, and is none the worse for it.
    wanted = lines_of(undisturbed / "run")
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert lines[0]["loss"] == pytest.approx(sum(line["loss"] for line in wanted[:3]) / 3, rel=1e-6)
    assert lines[0]["pairs"] == wanted[2]["pairs"]
    assert keys_of_steps(tmp_path / "run") == keys_of_steps(undisturbed / "run")


def _failing_on_rank_1(rank: int, world: int, folder: Path, where: str) -> str:
    def read(index: ShardIndex, *args: Any, shared: bool, real: Callable[..., Any] = read_batch) -> Any:
        validates = index.storage.place.endswith("/val")
        kind = "validation" if validates else "training" if args[-1] is not None else "constants"
        if rank == 1 and kind == where:
            raise UserError(f"{where} fails")
        return real(index, *args, shared=shared)

    def load(*args: Any, real: Callable[..., ShardIndex] = ShardIndex.load) -> ShardIndex:
        if rank == 1 and where == "index":
            raise UserError("index fails")
        return real(*args)

    env = RankEnv(rank=rank, world=world, local_rank=rank)
    with (
        mock.patch("data_pipeline.loader.read_batch", read),
        mock.patch("trainer.assembly.ShardIndex.load", load),
        pytest.raises(UserError) as caught,
    ):
        Trainer(loop_config(folder, "parallel.ep_size=2", "train.steps=2"), env).fit()
    return str(caught.value)


@pytest.mark.parametrize("where", ["index", "training", "constants", "validation"])
def test_what_fails_for_one_rank_is_the_same_error_on_all(where: str, undisturbed: Path, tmp_path: Path) -> None:
    link_shards(undisturbed, tmp_path)
    assert run_ranks(_failing_on_rank_1, 2, tmp_path, where) == [f"{where} fails"] * 2


def _differing_configs(rank: int, world: int, folder: Path) -> str:
    env = RankEnv(rank=rank, world=world, local_rank=rank)
    with pytest.raises(UserError) as caught:
        Trainer(loop_config(folder, f"optim.lr=0.{rank + 1}"), env)
    return str(caught.value)


def test_ranks_of_different_configurations_are_refused(undisturbed: Path, tmp_path: Path) -> None:
    link_shards(undisturbed, tmp_path)
    first, second = run_ranks(_differing_configs, 2, tmp_path)
    assert first == second
    assert "rank 1 has another optim.lr than rank 0" in first


def test_images_that_no_task_can_use_are_counted(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path)
    console = Console(file=io.StringIO(), width=200)
    listener = PlainProgress(console, 4)
    Trainer(loop_config(tmp_path, "tasks=[class_scene]"), alone, listener).close()
    assert isinstance(console.file, io.StringIO)
    assert "left out: 3 of 22 training images, without a label of these tasks" in console.file.getvalue()


@pytest.mark.parametrize("steps", [2, 3])
def test_ctrl_c_during_an_evaluation_is_not_lost_nor_is_the_evaluation(
    steps: int, undisturbed: Path, tmp_path: Path, alone: RankEnv
) -> None:
    link_shards(undisturbed, tmp_path)

    def constants(*args: Any, tolerant: bool) -> Constants:
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    with mock.patch("trainer.evaluation.validation.constant_predictor", constants), pytest.raises(Interrupted):
        train(tmp_path, alone, f"train.steps={steps}", "evaluate.every_steps=2")
    assert not (tmp_path / "run" / "evaluation").exists()
    train(tmp_path, alone, f"train.steps={steps}", "evaluate.every_steps=2")
    written = {path.name for path in (tmp_path / "run" / "evaluation").iterdir()}
    assert written == {f"step_{step:08d}_val.json" for step in (2, steps)}


def test_routing_ledgers_and_evaluation_can_be_made_again(undisturbed: Path) -> None:
    run_dir = undisturbed / "run"
    written = latest_evaluation(run_dir, step=STEPS)
    assert written is not None
    ledger_file = run_dir / "routing" / f"step_{STEPS:08d}.json"
    ledger = RoutingLedger.from_json(json.loads(ledger_file.read_text()))
    again = evaluate_run(run_dir)
    for task, score in written.tasks.items():
        assert again.tasks[task].value == pytest.approx(score.value, rel=1e-5)
    again_ledger = RoutingLedger.from_json(json.loads(ledger_file.read_text()))
    for layer, tokens in ledger.tokens.items():
        assert tokens.tolist() == again_ledger.tokens[layer].tolist() == [7 * 16, 7 * 16, 7 * 16, 6 * 16]
    assert latest_evaluation(run_dir, step=STEPS - 1) is None
    assert evaluate_run(run_dir, "train").images == 22
    with pytest.raises(UserError, match="train or val"):
        evaluate_run(run_dir, "test")  # type: ignore[arg-type]


def test_accumulation_equals_one_pass(undisturbed: Path, tmp_path: Path, alone: RankEnv) -> None:
    link_shards(undisturbed, tmp_path)
    weights = []
    for name, micro_batch in (("one", "null"), ("accumulated", "1")):
        options = ("matching.weight=0", "train.task_weighting=uncertainty", f"train.micro_batch={micro_batch}")
        trainer = Trainer(loop_config(tmp_path, f"run_dir={tmp_path}/{name}", *options), alone)
        norms = [trainer.step().gradient_norm for _ in range(3)]
        weights.append((norms, trainer.parts.model.backbone.patch.weight.detach().clone()))
        trainer.close()
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-4)
    assert weights[0][1].allclose(weights[1][1], atol=1e-5)


def test_bf16_with_recomputation_stays_near_fp32(undisturbed: Path, tmp_path: Path, alone: RankEnv) -> None:
    link_shards(undisturbed, tmp_path)
    norms = {}
    for dtype, mode in (("fp32", "none"), ("bf16", "recompute")):
        options = (f"train.dtype={dtype}", f"train.activation_checkpointing={mode}")
        trainer = Trainer(loop_config(tmp_path, f"run_dir={tmp_path}/{dtype}", *options), alone)
        norms[dtype] = [trainer.step().gradient_norm for _ in range(3)]
        assert trainer.state.bad_steps == 0
        trainer.close()
    assert norms["bf16"] == pytest.approx(norms["fp32"], rel=0.05)


def test_bad_steps_leave_no_trace_and_stop_the_run_at_the_limit(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path)
    trainer = Trainer(loop_config(tmp_path, "train.max_bad_steps=2"), alone)
    trainer.step()
    before = {name: value.clone() for name, value in trainer.parts.matching.state_dict().items()}
    weight = trainer.parts.model.backbone.patch.weight
    sound = weight.detach().clone()
    weight.data.fill_(float("nan"))
    assert trainer.step().skipped
    weight.data.copy_(sound)
    assert not trainer.step().skipped, "a single bad step is passed over"
    assert trainer.state.bad_steps == 1
    assert trainer.state.cursor.position == 12
    assert all(value.isfinite().all() for value in trainer.parts.matching.state_dict().values())
    weight.data.fill_(float("nan"))
    after = {name: value.clone() for name, value in trainer.parts.matching.state_dict().items()}
    trainer.step()
    with pytest.raises(UserError, match=r"in 2 steps in a row.*step 5 \(images 16 to 19 .*train-\d+"):
        trainer.step()
    for name, value in trainer.parts.matching.state_dict().items():
        assert value.equal(after[name])
        assert not value.equal(before[name])
    trainer.close()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path)
    trainer = Trainer(loop_config(tmp_path), alone)
    with pytest.raises(UserError, match="in use by another run"):
        Trainer(loop_config(tmp_path), alone)
    trainer.close()
    Trainer(loop_config(tmp_path), alone).close()


def test_other_shards_on_resume_are_refused(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path)
    train(tmp_path, alone)
    make_shards(tmp_path / "other", train=14)
    with pytest.raises(UserError, match="changed since the checkpoint"):
        Trainer(loop_config(tmp_path, f"data.train={tmp_path}/other/train", "train.steps=8"), alone)


def test_a_gradient_that_overflows_alone_is_told_with_its_batch(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path)
    trainer = Trainer(loop_config(tmp_path, "train.max_bad_steps=1"), alone)
    trainer.parts.model.backbone.patch.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UserError, match=r"all task losses of its samples \((train-\d+(, )?){4}\) were finite"):
        trainer.step()
    trainer.close()


def test_a_damaged_checkpoint_is_passed_over_with_a_note_and_the_run_ends_as_it_would_have(
    undisturbed: Path, tmp_path: Path, alone: RankEnv, capsys: pytest.CaptureFixture[str]
) -> None:
    link_shards(undisturbed, tmp_path)
    train(tmp_path, alone, *LONGER, "checkpoint.keep_last=3")
    close_distributed()
    for file in (tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    load_run_model(tmp_path / "run")
    assert f"passed over a damaged checkpoint: {tmp_path}" in capsys.readouterr().err
    console = Console(file=io.StringIO(), width=400)
    train(tmp_path, alone, *LONGER, listener=PlainProgress(console, 4))
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    assert "passed over a damaged checkpoint" in told
    assert "training from step 8 to 12" in told
    assert_same_run(tmp_path / "run", undisturbed / "run")


def test_what_was_measured_later_than_where_the_run_goes_on_is_no_part_of_it(
    undisturbed: Path, tmp_path: Path, alone: RankEnv
) -> None:
    link_shards(undisturbed, tmp_path)
    run_dir, options = (
        tmp_path / "run",
        ("checkpoint.every_steps=2", "evaluate.every_steps=2", "checkpoint.keep_last=3"),
    )
    train(tmp_path, alone, *options)
    for step in (2, 6):
        write_text_atomically(conflict_path(run_dir, step), "{}")
    for step in (4, 6):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{step:08d}")
    for steps, expected in ((3, {2, 3}), (2, {2})):  # the second from step 0
        train(tmp_path, alone, *options, f"train.steps={steps}")
        for folder in ("evaluation", "routing"):
            assert {int(path.name[5:13]) for path in (run_dir / folder).iterdir()} == expected
        assert conflict_path(run_dir, 2).exists() == (steps == 3)
        assert not conflict_path(run_dir, 6).exists()
        assert extract_tasks(run_dir, ["normal"], run_dir / "squad", images=1).step == steps
        shutil.rmtree(run_dir / "checkpoints")


def test_the_same_configuration_gives_the_same_bits(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path)
    options = ("model.router_noise=true", "data.workers=2", "data.tasks_per_image=2", "train.micro_batch=2")
    found = []
    for number in range(2):
        run_dir = tmp_path / f"run_{number}"
        train(tmp_path, alone, f"run_dir={run_dir}", *options)
        close_distributed()
        timing = {"step_seconds", "data_wait_seconds", "time"}
        lines = [{key: line[key] for key in line.keys() - timing} for line in lines_of(run_dir)]
        scores = [json.loads(path.read_text()) for path in sorted((run_dir / "evaluation").glob("*.json"))]
        found.append((lines, scores, read_weights(run_dir)[1]))
    (lines, scores, weights), (other_lines, other_scores, other_weights) = found
    assert lines == other_lines
    assert scores == other_scores
    assert all(value.equal(other_weights[name]) for name, value in weights.items())


def test_a_loader_that_was_replaced_is_let_go(tmp_path: Path, alone: RankEnv) -> None:
    make_shards(tmp_path)
    alive: list[int] = []

    class Count(PlainProgress):
        def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
            gc.collect()
            alive.append(sum(isinstance(found, TrainLoader) for found in gc.get_objects()))

    config = loop_config(tmp_path, "checkpoint.every_steps=1")
    with mock.patch.object(Trainer, "_place_experts", return_value=True):
        Trainer(config, alone, Count(Console(file=io.StringIO()), 4)).fit()
    assert alive == [1] * 6
