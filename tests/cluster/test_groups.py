"""Expert groups cover the world once; impossible layouts are refused with the choices that exist."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.groups import Layout, accumulation_steps, check_experts
from configs.errors import UserError
from configs.schema import ModelConfig


@given(st.integers(1, 8), st.integers(1, 8))
def test_groups_partition_the_world(ep_size: int, copies: int) -> None:
    layout = Layout(world=ep_size * copies, ep_size=ep_size)
    for groups in (layout.expert_groups(), layout.expert_data_groups()):
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
    for place, group in enumerate(layout.expert_data_groups()):
        assert {layout.expert_rank(rank) for rank in group} == {place}


def test_ep_size_must_divide_the_world() -> None:
    with pytest.raises(UserError, match=r"ep_size 3 does not divide the world of 4 ranks: choose one of \[1, 2, 4\]"):
        Layout(world=4, ep_size=3)


def test_ep_size_must_divide_the_experts_that_are_used() -> None:
    model = ModelConfig.model_validate({"preset": "small", "placement": "mlp"})
    check_experts(model, 4)  # 16 MLP experts; the 15 attention experts are not built
    with pytest.raises(UserError, match="attention_experts 15 is not divisible"):
        check_experts(ModelConfig.model_validate({"preset": "small"}), 4)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_accumulation_covers_the_global_batch(world: int, micro_batch: int, accumulation: int) -> None:
    images = world * micro_batch * accumulation
    assert accumulation_steps(images, micro_batch, world) == (micro_batch, accumulation)
    assert accumulation_steps(images, None, world) == (micro_batch * accumulation, 1)


def test_uneven_global_batches_are_refused() -> None:
    with pytest.raises(UserError, match="images_per_step 10 is not divisible by the world of 4"):
        accumulation_steps(10, None, 4)
    with pytest.raises(UserError, match="micro_batch 3 does not divide the 4 images"):
        accumulation_steps(8, 3, 2)
