"""The journal: means over steps and pairs, nulls, truncation."""

import json
from pathlib import Path

import pytest
import torch

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


def test_a_line_holds_means_over_steps_and_pairs() -> None:
    journal = Journal(TASKS, LAYERS, torch.device("cpu"))
    for step in (1, 2):
        for passed in range(2):  # two forward passes: 3 pairs of depth, then a single one
            part = statistics([[3.0, 1.0][passed] * step, 0.0], [[3, 1][passed], 0], information=0.5 * step)
            journal.add_micro_batch(torch.tensor([1.0, 3.0][passed]), part, scale=2.0)
        journal.add_step(seconds=2.0 * step, wait_seconds=1.0, world=1)
        if step == 1:  # a checkpoint between the lines must not change them
            saved = journal.sums.clone()
            journal = Journal(TASKS, LAYERS, torch.device("cpu"))
            journal.restore(saved, rank=0)
    first = journal.line(journal.sums)
    journal.next_line()
    second = journal.line(journal.sums)
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


def test_the_sums_of_a_run_are_kept_by_rank_0_alone() -> None:
    saved = torch.arange(1.0, 13.0, dtype=torch.float64)
    for rank, expected in ((0, saved), (1, torch.zeros_like(saved))):
        journal = Journal(TASKS, LAYERS, torch.device("cpu"))
        journal.restore(saved, rank)
        assert torch.equal(journal.sums, expected)


def test_truncation_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    truncate_lines(tmp_path, 3)  # nothing there yet
    for step in (1, 3, 5):
        append_line(tmp_path, {"step": step, "loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    truncate_lines(tmp_path, 4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]
