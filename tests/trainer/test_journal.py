"""The journal: means over steps and pairs, nulls, truncation."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from trainer.journal import Journal, append_line, truncate_lines
from trainer.objective import StepStatistics

TASKS, LAYERS = ["depth", "scene"], ["blocks.0.mlp"]


def statistics(losses: list[float], pairs: list[int], information: float = 0.0) -> StepStatistics:
    return StepStatistics(
        loss_sum_T=torch.tensor(losses),
        pairs_T=torch.tensor(pairs),
        matching_loss=torch.tensor(-information),
        mutual_information={"blocks.0.mlp": torch.tensor(information)},
        routing=[],
    )


def _two_steps(rank: int, world: int) -> tuple[dict[str, object], dict[str, object]]:
    group = dist.group.WORLD
    assert group is not None
    journal = Journal(TASKS, LAYERS, torch.device("cpu"))
    for step in (1, 2):
        # Rank 0 holds 3 pairs of depth and rank 1 a single one, in each step.
        part = statistics([[3.0, 1.0][rank] * step, 0.0], [[3, 1][rank], 0], information=0.5 * step)
        journal.add_micro_batch(torch.tensor([1.0, 3.0][rank]), part, scale=float(world))
        journal.add_step(seconds=[2.0, 4.0][rank], wait_seconds=1.0, world=world)
        if step == 1:  # a checkpoint between the lines must not change them
            saved = journal.collect(group, rank)
            journal = Journal(TASKS, LAYERS, torch.device("cpu"))
            journal.restore(saved, rank)
    first = journal.line(journal.collect(group, rank))
    journal.next_line()
    return first, journal.line(journal.collect(group, rank))


def test_a_line_holds_means_over_the_steps_of_all_ranks() -> None:
    for first, second in run_ranks(_two_steps, 2):
        assert first == {
            "loss": 2.0,
            "task_loss": {"depth": 1.5, "scene": None},
            "matching_loss": pytest.approx(-0.75),
            "mutual_information": {"blocks.0.mlp": pytest.approx(0.75)},
            "pairs": {"depth": 8, "scene": 0},
            "step_seconds": 3.0,
            "data_wait_seconds": 1.0,
        }
        assert second["loss"] is None
        assert second["pairs"] == {"depth": 8, "scene": 0}


def test_truncation_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    truncate_lines(tmp_path, 3)  # nothing there yet
    for step in (1, 3, 5):
        append_line(tmp_path, {"step": step, "loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    truncate_lines(tmp_path, 4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]
