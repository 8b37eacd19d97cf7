"""Selected classes: as many as published, and targets that the selected classes alone would give."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from configs.errors import UserError
from configs.tasks import TASKS
from data_pipeline.sources.taskonomy_classes import SELECTED, select_classes
from data_pipeline.targets import to_target

NO_MASK = torch.ones(1, 1, 1, dtype=torch.bool)


@pytest.mark.parametrize(("task", "count"), [("class_object", 100), ("class_scene", 63)])
def test_the_lists_have_the_published_length(task: str, count: int) -> None:
    assert list(SELECTED[task]) == sorted(set(SELECTED[task]))
    assert len(SELECTED[task]) == count
    assert SELECTED[task][0] >= 0
    assert SELECTED[task][-1] < TASKS[task].channels


def test_known_classes_are_selected() -> None:
    """ImageNet: 620 laptop, 831 studio couch, 1 goldfish. Places365: 203 kitchen, 52 bedroom, 0 airfield."""
    assert {620, 831} <= set(SELECTED["class_object"])
    assert {203, 52} <= set(SELECTED["class_scene"])
    assert 1 not in SELECTED["class_object"]
    assert 0 not in SELECTED["class_scene"]


def test_objects_are_the_softmax_over_the_selected_logits() -> None:
    logits = np.random.default_rng(0).normal(-20.0, 8.0, 1000).astype(np.float32)
    chosen = list(SELECTED["class_object"])
    target = target_of("class_object", logits)
    expected = torch.from_numpy(logits[chosen]).double().softmax(0)
    torch.testing.assert_close(target[chosen].double(), expected, rtol=1e-5, atol=1e-9)
    assert np.count_nonzero(np.delete(target.numpy(), chosen)) == 0


def test_scenes_are_the_selected_probabilities_renormalised() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.full(365, 0.1)).astype(np.float32)
    chosen = list(SELECTED["class_scene"])
    target = target_of("class_scene", probabilities).numpy()
    np.testing.assert_allclose(target[chosen], probabilities[chosen] / probabilities[chosen].sum(), rtol=1e-5)
    assert np.count_nonzero(np.delete(target, chosen)) == 0


def target_of(task: str, stored: NDArray[np.float32]) -> torch.Tensor:
    selected = select_classes(TASKS[task], stored)
    assert selected.dtype == np.float32
    assert np.isfinite(selected).all()
    return to_target(TASKS[task], torch.from_numpy(selected)[None], NO_MASK).values[0]


def test_scenes_without_a_selected_class_are_refused() -> None:
    outdoors = np.zeros(365, np.float32)
    outdoors[0] = 1.0
    with pytest.raises(UserError, match="none of the 63 selected classes"):
        select_classes(TASKS["class_scene"], outdoors)
