from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.pictures import ink
from trainer.charts.training import LossCurve, Progress, loss_comparison_chart, progress_chart, task_loss_chart


def progress(steps: np.ndarray, mutual_information: dict[str, np.ndarray]) -> Progress:
    falling = 1 / (1 + steps)
    return Progress(
        steps=steps,
        loss=falling,
        mutual_information=mutual_information,
        learning_rate=falling,
        images_per_second=steps,
    )


@pytest.mark.parametrize("logged", [1, 5, 200])
def test_curves_of_any_length_are_drawn(tmp_path: Path, logged: int) -> None:
    steps = np.arange(logged, dtype=np.float64)
    information = {"block0.attention": steps, "block1.mlp": steps / 2}
    progress_chart(tmp_path / "progress.png", progress(steps, information))
    task_loss_chart(tmp_path / "tasks.png", steps, {f"task{i}": 1 / (1 + steps) for i in range(7)})
    assert ink(tmp_path / "progress.png") > 10_000
    assert ink(tmp_path / "tasks.png") > 10_000


def test_a_model_without_experts_has_no_panel_of_mutual_information(tmp_path: Path) -> None:
    steps = np.arange(9, dtype=np.float64)
    progress_chart(tmp_path / "dense.png", progress(steps, {}))
    progress_chart(tmp_path / "experts.png", progress(steps, {"blocks.0.mlp": steps}))
    with Image.open(tmp_path / "dense.png") as dense, Image.open(tmp_path / "experts.png") as experts:
        assert dense.height < 0.6 * experts.height  # one row of panels, not two


def test_a_gap_of_non_finite_losses_does_not_hide_the_rest(tmp_path: Path) -> None:
    steps = np.arange(100, dtype=np.float64)
    loss = np.where((steps > 40) & (steps < 60), np.nan, 1.0)
    task_loss_chart(tmp_path / "gap.png", steps, {"depth": loss})
    task_loss_chart(tmp_path / "empty.png", steps, {"depth": np.full(100, np.nan)})
    assert ink(tmp_path / "gap.png") > ink(tmp_path / "empty.png")


def test_runs_of_any_name_are_in_the_legend(tmp_path: Path) -> None:
    steps = np.arange(9, dtype=np.float64)

    def drawn(name: str) -> int:
        curves = [LossCurve(name=each, place=steps, loss=steps) for each in (name, "new")]
        loss_comparison_chart(tmp_path / "losses.png", {"total": curves}, "step")
        return ink(tmp_path / "losses.png")

    assert drawn("_long_ago") > drawn("_")
    assert drawn("cost$1^$") > drawn("_")
