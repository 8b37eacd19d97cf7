import json
import math
from pathlib import Path

import pytest

from configs.errors import UserError
from tests.trainer.run_folder import LAYERS, STEPS, conflict_record, run_config, step_line, write_run_folder
from trainer.run_files import read_config, read_latest_conflict, read_latest_evaluation, read_latest_ledger, read_steps


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run_folder(tmp_path / "run")


def test_a_finished_run_reads_back(run: Path) -> None:
    assert read_config(run) == run_config(run, val=str(run / "no-shards"))
    steps = read_steps(run)
    assert [record.step for record in steps] == list(range(1, STEPS + 1))
    assert steps[3].task_loss == {"depth_zbuffer": 0.25, "normal": 0.5}
    evaluation = read_latest_evaluation(run)
    assert evaluation is not None
    assert evaluation.tasks["normal"].value == 33.0
    found = read_latest_ledger(run)
    assert found is not None
    assert found[0] == STEPS
    assert found[1].share(LAYERS[0].name, "normal").tolist() == [0, 0, 1, 1]


def test_a_young_run_has_nothing_yet(tmp_path: Path) -> None:
    assert read_steps(tmp_path) == []
    assert read_latest_evaluation(tmp_path) is None
    assert read_latest_ledger(tmp_path) is None
    assert read_latest_conflict(tmp_path) is None


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder.*config\.yaml"):
        read_config(tmp_path)


def test_a_line_cut_short_by_a_crash_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    assert len(read_steps(run)) == STEPS


def test_a_damaged_line_is_named(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo\n')
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line {STEPS + 1}: not valid JSON"):
        read_steps(run)


def test_a_missing_key_is_named(run: Path) -> None:
    line = step_line(1)
    del line["learning_rate"]
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="line 1: learning_rate"):
        read_steps(run)


def test_null_stands_for_what_could_not_be_computed(run: Path) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({**step_line(1), "loss": None}) + "\n")
    assert math.isnan(read_steps(run)[0].loss)


def test_the_latest_evaluation_of_the_split_counts(run: Path) -> None:
    newest = {"step": 100, "split": "val", "images": 4, "tasks": {}}
    (run / "evaluation" / "step_00000100_val.json").write_text(json.dumps(newest))
    (run / "evaluation" / "step_00000200_train.json").write_text(json.dumps({**newest, "split": "train"}))
    evaluation = read_latest_evaluation(run)
    assert evaluation is not None
    assert evaluation.step == 100


@pytest.mark.parametrize(("content", "reason"), [("{", "not valid JSON"), ('{"version": 1}', "missing")])
def test_a_damaged_ledger_is_named(run: Path, content: str, reason: str) -> None:
    (run / "routing" / "step_00000099.json").write_text(content)
    with pytest.raises(UserError, match=rf"step_00000099\.json.*{reason}"):
        read_latest_ledger(run)


def test_the_conflict_of_the_highest_step_counts(run: Path) -> None:
    (run / "conflict").mkdir()
    record = conflict_record()
    for step in (7, STEPS):
        written = record.model_copy(update={"step": step})
        (run / "conflict" / f"step_{step:08d}.json").write_text(written.model_dump_json())
    assert read_latest_conflict(run) == record
    (run / "conflict" / "step_00000099.json").write_text('{"step": 99}')
    with pytest.raises(UserError, match=r"step_00000099\.json: images"):
        read_latest_conflict(run)
