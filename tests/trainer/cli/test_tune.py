"""`modsquad tune` as a user types it: what it refuses, and what it leaves out before any trial."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.errors import UserError
from tests.trainer.loop_run import loop_config
from trainer.cli.main import app


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "slurm", "--ranks", "2"], "--ranks is for this machine"),
        (["--profile", "gpu8"], "--profile is for jobs: add --on slurm"),
        (["--search", "train.micro_batch"], "--search 'train.micro_batch' is not of the form key=value1,value2"),
        (["--search", "train.micro_batch=1,,2"], "is not of the form key=value1,value2"),
        (["--search", "train.steps=1,2"], "--search train.steps: not among what can be tuned"),
        (["--ranks", "3"], "train.images_per_step 4 is not divisible by the world of 3 ranks"),
        (["--memory-gib", "0.1", "model.width=4096"], "settings fits the memory"),
    ],
)
def test_mistakes_are_told_before_any_trial(tmp_path: Path, options: list[str], message: str) -> None:
    loop_config(tmp_path)
    out = tmp_path / "search"
    arguments = ["tune", str(tmp_path / "recipe.yaml"), *options, "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not out.exists()
