"""Heads: shapes, the place of every pixel, empty slices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.tasks import get_task
from model.heads import DenseHead, VectorHead, make_head


@pytest.mark.parametrize("task", ["normal", "semseg", "class_scene"])
@pytest.mark.parametrize("pairs", [0, 3])
def test_predictions_have_the_task_s_shape(task: str, pairs: int) -> None:
    spec = get_task(task)
    head = make_head(spec, width=8, patch_size=4, grid=3).to(torch.bfloat16)
    y = head(torch.randn(pairs, 9, 8, dtype=torch.bfloat16))
    assert y.shape == ((pairs, spec.channels, 12, 12) if spec.dense else (pairs, spec.channels))
    assert y.dtype == torch.float32
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@given(patch=st.integers(1, 4), grid=st.integers(1, 4), channels=st.integers(1, 3), data=st.data())
def test_a_patch_paints_its_own_pixels_only(patch: int, grid: int, channels: int, data: st.DataObject) -> None:
    head = DenseHead(width=6, channels=channels, patch_size=patch, grid=grid, init="standard")
    x = torch.randn(1, grid * grid, 6)
    moved = x.clone()
    row, column = data.draw(st.integers(0, grid - 1)), data.draw(st.integers(0, grid - 1))
    moved[0, row * grid + column] = torch.randn(6)
    changed = (head(moved) != head(x))[0].any(0)
    assert changed.any()
    changed[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = False
    assert not changed.any()


def test_vector_heads_ignore_the_order_of_patches() -> None:
    head = VectorHead(width=6, channels=5)
    x = torch.randn(2, 7, 6)
    assert torch.allclose(head(x), head(x.flip(1)), atol=1e-6)
