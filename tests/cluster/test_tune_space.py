"""What is searched: every point can run at the same global batch, none repeats another, nothing else is changed."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tune_space import DTYPE, TUNABLE, Space, Value, check_runs, configured, search_space, with_value
from configs.errors import UserError
from configs.load import differing_keys
from configs.schema import RunConfig


def run_config(**train: Any) -> RunConfig:
    return RunConfig.model_validate({"train": {"images_per_step": 16, **train}})


def space_of(config: RunConfig, world: int, *, gpus: bool = True, **wanted: list[Value]) -> Space:
    named = {key.replace("__", "."): values for key, values in wanted.items()}
    return search_space(config, world, gpus=gpus, cores_per_rank=4, parameters=30_000_000, wanted=named)


@settings(deadline=None, max_examples=30)
@given(
    world=st.sampled_from([1, 2, 3, 4, 6, 8]),
    per_rank=st.sampled_from([1, 2, 6]),
    experts=st.sampled_from([4, 6, 15]),
    gpus=st.booleans(),
)
def test_every_point_runs_at_the_same_global_batch(world: int, per_rank: int, experts: int, gpus: bool) -> None:
    config = RunConfig.model_validate(
        {"train": {"images_per_step": world * per_rank}, "model": {"attention_experts": experts}}
    )
    space = space_of(config, world, gpus=gpus)
    assert len(set(space.points)) == len(space.points)
    for point in space.points:
        changed = with_value(config, space.named(point))
        check_runs(changed, world)
        assert set(differing_keys(config, changed)) <= set(TUNABLE) - {DTYPE}
    own = tuple(configured(config, key, world) for key in space.values)
    assert own in space.points


def test_what_zero_0_does_not_use_makes_no_points_of_it() -> None:
    space = space_of(run_config(), 2)
    by_stage = {
        stage: [named for point in space.points if (named := space.named(point))["parallel.zero_stage"] == stage]
        for stage in (0, 1)
    }
    assert {named["parallel.bucket_elements"] for named in by_stage[0]} == {50_000_000}
    assert {named["parallel.overlap_communication"] for named in by_stage[0]} == {False}
    assert {named["parallel.bucket_elements"] for named in by_stage[1]} == {2_000_000, 10_000_000, 50_000_000}
    assert len(by_stage[1]) == 6 * len(by_stage[0])


def test_one_rank_has_nothing_to_reduce_and_a_cpu_nothing_to_overlap() -> None:
    assert not {"parallel.bucket_elements", "parallel.ep_size"} & space_of(run_config(), 1).values.keys()
    on_cpu = space_of(run_config(), 2, gpus=False).values
    assert "parallel.overlap_communication" not in on_cpu
    assert on_cpu["train.activation_checkpointing"] == ("none", "recompute")


def test_the_configured_value_is_searched_unless_other_values_are_wanted() -> None:
    config = RunConfig.model_validate({"data": {"workers": 3}, "train": {"images_per_step": 16, "micro_batch": 2}})
    assert space_of(config, 1).values["data.workers"] == (0, 1, 2, 3, 4)
    space = space_of(config, 1, data__workers=[1, 8], train__dtype=["fp32", "bf16"], parallel__zero_stage=[1])
    assert space.values["data.workers"] == (1, 8)
    assert space.values["train.dtype"] == ("fp32", "bf16")
    assert "parallel.zero_stage" not in space.values, "only the configured value is left"
    assert space_of(config, 1, parallel__zero_stage=[2]).values["parallel.zero_stage"] == (2,)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"train.micro_bach": [1]}, "--search train.micro_bach: not among what can be tuned, did you mean 'train.mic"),
        ({"optim.lr": [1]}, "--search optim.lr: not among what can be tuned"),
        ({"parallel.zero_stage": [3]}, "--search parallel.zero_stage=3: this value does not fit the key"),
        ({"train.micro_batch": [3, 5]}, "no combination can run: train.micro_batch 5 does not divide the 8 images"),
    ],
)
def test_mistakes_are_one_line(wanted: dict[str, list[Value]], message: str) -> None:
    with pytest.raises(UserError) as error:
        search_space(run_config(), 2, gpus=False, cores_per_rank=1, parameters=10, wanted=wanted)
    assert str(error.value).startswith(message)


def test_what_does_not_fit_is_not_in_the_space() -> None:
    space = space_of(run_config(), 2)
    small = space.kept(lambda values: values["train.micro_batch"] == 1)
    assert {small.named(point)["train.micro_batch"] for point in small.points} == {1}
    with pytest.raises(UserError, match=r"none of the .* settings fits the memory"):
        space.kept(lambda values: False)
