"""What DeepSpeed's monitor leaves in a run folder: the record once, by rank 0 alone, however often the run began."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cluster.env import RankEnv
from configs.errors import UserError
from tests.ranks import run_ranks
from tests.trainer.loop_run import NAMES, loop_config, make_shards
from tests.trainer.rank_processes import lines_of
from tests.trainer.run_folder import STEPS, step_line, write_lines_of_grown_batch, write_run_folder
from trainer.engine import Event, close_distributed
from trainer.loop import Trainer
from trainer.telemetry.trackers import Trackers, line_events

ALL_FILES = ("trackers.csv=true", "trackers.tensorboard=true")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, train=12, val=4)
    return folder


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Iterator[Path]:
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(shards / split)
    yield tmp_path
    close_distributed()


def _fit(rank: int, world: int, folder: Path, *overrides: str) -> None:
    Trainer(loop_config(folder, *overrides), RankEnv(rank=rank, world=world, local_rank=rank)).fit()


def csv_values(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return file name -> (step, value); checks that there is one header line."""
    found = {}
    for path in (run / "trackers" / "csv").glob("*.csv"):
        header, *rows = csv.reader(path.read_text().splitlines())
        assert header[0] == "step"
        found[path.stem] = [(int(step), float(value)) for step, value in rows]
    return found


def tensorboard_values(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "trackers" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def recorded(run: Path, images_per_step: int = 4) -> dict[str, list[tuple[int, float]]]:
    """Return what metrics.jsonl and the evaluations say, by the names in the trackers."""
    wanted: dict[str, list[tuple[int, float]]] = {}
    for line in lines_of(run):
        values: dict[str, Any] = {
            "train/loss": line["loss"],
            "train/matching_loss": line["matching_loss"],
            "train/learning_rate": line["learning_rate"],
            "train/gradient_norm": line["gradient_norm"],
            "train/images_per_second": images_per_step / line["step_seconds"],
        }
        values |= {f"task_loss/{task}": loss for task, loss in line["task_loss"].items()}
        values |= {f"mutual_information/{layer}": value for layer, value in line["mutual_information"].items()}
        for name, value in values.items():
            wanted.setdefault(name, []).append((line["step"], value))
    for path in sorted((run / "evaluation").glob("*_val.json")):
        content = json.loads(path.read_text())
        for task, scores in content["tasks"].items():
            for metric, score in scores["all"].items():
                wanted.setdefault(f"val/{task}/{metric}", []).append((content["step"], score["value"]))
    return wanted


def assert_record_once(run: Path) -> None:
    wanted = recorded(run)
    assert {f"task_loss/{name}" for name in NAMES} < wanted.keys()
    assert csv_values(run) == {name.replace("/", "_"): rows for name, rows in wanted.items()}
    events = tensorboard_values(run)
    assert events.keys() == wanted.keys()
    for name, rows in wanted.items():
        assert [step for step, _ in events[name]] == [step for step, _ in rows]
        assert [value for _, value in events[name]] == pytest.approx([value for _, value in rows], rel=1e-6)


def test_two_ranks_write_the_record_once_and_again_once_after_a_restart(folder: Path) -> None:
    run = folder / "run"
    run_ranks(_fit, 2, folder, *ALL_FILES, "train.steps=5", "evaluate.every_steps=2", "parallel.ep_size=2")
    assert_record_once(run)
    # As after a crash: the last checkpoint is older than the last line.
    shutil.rmtree(run / "checkpoints" / "step_00000005")
    (run / "evaluation" / "step_00000005_val.json").unlink()
    _fit(0, 1, folder, *ALL_FILES, "train.steps=8", "evaluate.every_steps=2")
    assert [line["step"] for line in lines_of(run)] == list(range(1, 9))
    assert_record_once(run)


def test_a_finished_run_that_is_started_again_gets_all_of_its_past(folder: Path) -> None:
    _fit(0, 1, folder, "train.steps=2")
    assert not (folder / "run" / "trackers").exists()  # off by default
    close_distributed()
    _fit(0, 1, folder, "train.steps=2", *ALL_FILES)
    assert_record_once(folder / "run")


@pytest.mark.parametrize("tracker", ["trackers.csv=true", "trackers.wandb_project=squads"])
def test_speed_is_that_of_the_lines_where_the_batch_has_changed(tmp_path: Path, tracker: str) -> None:
    run = write_run_folder(tmp_path / "run")
    write_lines_of_grown_batch(run)
    written: list[Event] = []
    with (
        mock.patch("trainer.telemetry.trackers.open_monitor", return_value=written.extend),
        mock.patch("trainer.telemetry.trackers.find_spec"),
    ):
        trackers = Trackers(run, loop_config(tmp_path, tracker), RankEnv(), STEPS)
    trackers.on_line({**step_line(STEPS + 2), "images": 800 + 2 * 64})
    speeds = [value for name, value, _ in written if name == "train/images_per_second"]
    past = [32.0] * 20 + [128.0] * 20 if "csv" in tracker else []
    assert speeds == [*past, 256.0]


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "trackers" / "csv" / "train_loss.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text("of rank 0")
    trackers = Trackers(tmp_path, loop_config(tmp_path, *ALL_FILES), RankEnv(rank=1, world=2, local_rank=1), 0)
    trackers.on_line(step_line(1))
    trackers.close()
    assert [path for path in (tmp_path / "trackers").rglob("*") if path.is_file()] == [kept]
    assert kept.read_text() == "of rank 0"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_library_is_named_with_its_extra_on_every_rank(tmp_path: Path, rank: int) -> None:
    config = loop_config(tmp_path, "trackers.tensorboard=true")
    with (
        mock.patch("trainer.telemetry.trackers.find_spec", return_value=None),
        pytest.raises(
            UserError, match=r"trackers\.tensorboard: tensorboard is not installed; .*modsquad\[tensorboard\]"
        ),
    ):
        Trackers(tmp_path, config, RankEnv(rank=rank, world=2, local_rank=rank), 0)


def test_weights_and_biases_is_named_when_missing_and_when_it_does_not_start(tmp_path: Path) -> None:
    config = loop_config(tmp_path, "trackers.wandb_project=squads")
    with (
        mock.patch("trainer.telemetry.trackers.find_spec", return_value=None),
        pytest.raises(UserError, match=r"trackers\.wandb_project: wandb is not installed.*modsquad\[wandb\]"),
    ):
        Trackers(tmp_path, config, RankEnv(), 0)
    with (
        mock.patch("trainer.telemetry.trackers.find_spec"),
        mock.patch("trainer.telemetry.trackers.open_monitor", side_effect=RuntimeError("no API\nkey")) as opened,
        pytest.raises(UserError, match="Weights & Biases does not start: no API key; see `wandb login`"),
    ):
        Trackers(tmp_path / "my-run", config, RankEnv(), 0)
    assert opened.call_args.args[0]["wandb"]["group"] == "my-run"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "trackers").write_text("a file in the way")
    with pytest.raises(UserError, match=r"cannot write .*/trackers"):
        Trackers(tmp_path, loop_config(tmp_path, "trackers.csv=true"), RankEnv(), 0)


def test_a_number_that_does_not_exist_is_left_out() -> None:
    line = {
        "step": 3,
        "loss": None,
        "matching_loss": -0.5,
        "learning_rate": 0.1,
        "gradient_norm": None,
        "task_loss": {"normal": None},
        "mutual_information": {"blocks.0.mlp": 0.0},
    }
    assert line_events(line, None) == [
        ("train/matching_loss", -0.5, 3),
        ("train/learning_rate", 0.1, 3),
        ("mutual_information/blocks.0.mlp", 0.0, 3),
    ]


def test_a_team_without_a_project_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wandb_team needs wandb_project"):
        loop_config(tmp_path, "trackers.wandb_team=us")
