"""Every row of the task table is complete and consistent."""

import pytest

from configs.errors import UserError
from configs.tasks import GROUPS, TASKS, TaskSpec, get_task, resolve_tasks

ROWS = pytest.mark.parametrize("spec", TASKS.values(), ids=list(TASKS))


def test_thirteen_taskonomy_and_five_pascal_context_tasks() -> None:
    assert {group: len(names) for group, names in GROUPS.items()} == {"taskonomy": 13, "pascal_context": 5}


@ROWS
def test_loss_and_target_fit_together(spec: TaskSpec) -> None:
    losses = {
        "class_logits": {"soft_cross_entropy"},
        "class_probabilities": {"soft_cross_entropy"},
        "class_ids": {"cross_entropy"},
        "binary": {"balanced_bce"},
        "unit_vector": {"cosine"},
    }
    assert spec.loss in losses.get(spec.target, {"l1", "l2"})
    assert spec.dense != spec.target.startswith("class_") or spec.target == "class_ids"


@ROWS
def test_parameters_of_the_mapping_are_given(spec: TaskSpec) -> None:
    if spec.target == "standardise":
        assert len(spec.mean) == len(spec.std) == spec.channels
    if spec.target == "unit_vector":
        assert spec.channels == spec.encoding.channels == 3
        assert spec.oriented
    if spec.class_names:
        assert len(spec.class_names) == spec.channels
    if spec.target in ("class_ids", "region_boundary", "log_depth"):
        assert spec.interpolation == "nearest", "ids and depths with invalid codes must never be averaged"


def test_names_resolve_in_order() -> None:
    assert [spec.name for spec in resolve_tasks(["semseg", "normal"])] == ["semseg", "normal"]
    assert len(resolve_tasks("taskonomy")) == 13
    assert len(resolve_tasks(["taskonomy", "pascal_context"])) == 18


def test_unknown_empty_and_repeated_names_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'normal'"):
        get_task("normall")
    with pytest.raises(UserError, match="no task given"):
        resolve_tasks([])
    with pytest.raises(UserError, match="given twice"):
        resolve_tasks(["taskonomy", "normal"])
