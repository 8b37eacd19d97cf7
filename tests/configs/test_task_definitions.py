"""A user's own tasks: what a definition gives, what it may not say, and that it survives every way it travels."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from configs.errors import UserError
from configs.load import dump_config, load_config
from configs.schema import RunConfig
from configs.task_definitions import (
    MOST_TASKS,
    RESERVED_MEMBERS,
    RESERVED_WORDS,
    TaskDefinition,
    contradiction,
    defined_in,
    definitions_of,
    derive_tasks,
)
from configs.tasks import TASKS, TaskSpec
from data_pipeline.planning.labels import code_dtype
from data_pipeline.tarscan import IMAGE_FIELD, MASK_FIELD, META_FIELD
from model.heads import make_head

LANES = {"like": "semseg", "class_names": ["road", "lane", "curb"]}
WEATHER = {"like": "class_scene", "class_names": ["sun", "rain", "snow"]}


def defined(**definition: Any) -> TaskSpec:
    return defined_in({"define_tasks": {"mine": definition}}, "file")["mine"]


def refusal(definitions: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        defined_in({"define_tasks": definitions}, "own.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_classes_decide_channels_and_what_is_stored() -> None:
    lanes, weather = defined(**LANES), defined(**WEATHER)
    assert (lanes.channels, lanes.encoding, lanes.loss) == (3, TASKS["semseg"].encoding, "cross_entropy")
    assert (weather.channels, weather.encoding.channels, weather.metric) == (3, 3, "accuracy")
    assert lanes.class_names == ("road", "lane", "curb")


def test_what_is_not_said_is_that_of_the_row() -> None:
    spec = defined(like="edge_texture", scale=100.0, clip=False, loss="l2", metrics=["mse", "l1"], blur_fraction=0.1)
    assert (spec.scale, spec.clip, spec.loss, spec.metrics, spec.blur_fraction) == (
        100.0,
        False,
        "l2",
        ("mse", "l1"),
        0.1,
    )
    assert (spec.encoding, spec.picture, spec.interpolation) == (TASKS["edge_texture"].encoding, "heat", "bilinear")


def test_a_value_for_unknown_is_never_averaged() -> None:
    spec = defined(like="keypoints2d", invalid=0)
    assert spec.encoding.invalid == 0
    assert spec.interpolation == "nearest"
    assert TASKS["keypoints2d"].interpolation == "bilinear"


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({"class_names": ["a", "b"]}, "define_tasks.mine.like: Field required"),
        ({"like": "semsegg"}, "define_tasks.mine: unknown task 'semsegg': did you mean 'semseg'?"),
        ({"like": "taskonomy"}, "unknown task 'taskonomy'"),
        ({"like": "semseg", "class_names": ["road"]}, "class_names holds 1: a task of classes needs two or more"),
        ({"like": "semseg", "class_names": []}, "class_names holds 0"),
        ({"like": "semseg", "class_names": ["road", "road"]}, "class name 'road' is there 2 times"),
        ({"like": "class_scene", "class_names": ["1", "2"]}, "class name '1' would be read as a class's number"),
        ({"like": "class_scene", "class_names": ["sun", "void"]}, "class name 'void' would be read"),
        ({"like": "class_scene", "class_names": ["sun ", "rain"]}, "class name 'sun ' is empty, or holds spaces"),
        ({"like": "class_scene", "class_names": ["", "rain"]}, "class name '' is empty"),
        ({"like": "class_scene", "class_names": [True, False]}, "class_names.0: Input should be a valid string"),
        ({"like": "semseg", "class_names": [f"c{n}" for n in range(256)]}, "256 classes are more than the 255 that"),
        ({"like": "semseg", "invalid": 20}, "invalid 20 is the id of a class: use 21 to 255"),
        ({"like": "semseg", "invalid": 256}, "invalid 256 is beyond 255, the largest uint8"),
        ({"like": "semseg", "loss": "l1"}, "loss l1 does not fit a task like semseg: use cross_entropy"),
        ({"like": "depth_zbuffer", "loss": "l3"}, "define_tasks.mine.loss: Input should be 'l1'"),
        ({"like": "normal", "metrics": ["l1"]}, "metric l1 does not fit a task like normal: use mean_angle_deg"),
        ({"like": "edges", "metrics": []}, "define_tasks.mine.metrics"),
        ({"like": "edges", "metrics": ["ods_f", "ods_f"]}, "metrics: name each one once"),
        ({"like": "semseg", "scale": 2}, "scale has no meaning for a task like semseg: it takes class_names, invalid"),
        ({"like": "depth_zbuffer", "class_names": ["a", "b"]}, "class_names has no meaning for a task like depth"),
        ({"like": "saliency", "scale": 300}, "scale 300 is beyond 255, the largest uint8"),
        ({"like": "keypoints2d", "scale": 0}, "define_tasks.mine.scale: Input should be greater than 0"),
        ({"like": "keypoints2d", "scale": float("nan")}, "define_tasks.mine.scale"),
        ({"like": "principal_curvature", "mean": [1.0]}, "mean holds 1 numbers, but principal_curvature has 2"),
        ({"like": "principal_curvature", "std": [1.0, 0.0]}, "define_tasks.mine.std.1"),
        ({"like": "depth_zbuffer", "codes_per_meter": 4}, "did you mean 'define_tasks.mine.codes_per_metre'?"),
        ("semseg", "define_tasks.mine: Input should be"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(definition: Any, message: str) -> None:
    said = refusal({"mine": definition})
    assert said.startswith("own.yaml: ")
    assert "define_tasks.mine" in said
    assert message in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("semseg", "'semseg' is in the task table already"),
        ("pascal_context", "is in the task table already"),
        ("rgb", "means something else"),
        ("mask_valid", "means something else"),
        ("type", "means something else"),
        ("images", "means something else"),
        ("class", "means something else"),
        ("Lanes", "'Lanes' cannot name a member of shards"),
        ("lane.left", "cannot name"),
        ("a/b", "cannot name"),
        ("2lanes", "cannot name"),
        ("", "cannot name"),
        ("a" * 49, "cannot name"),
        ("spur\u00fcr", "'spur\\xfcr' cannot name"),
    ],
)
def test_names_must_be_new_and_fit_for_files(name: str, message: str) -> None:
    said = refusal({name: LANES})
    assert said.startswith("own.yaml: define_tasks: ")
    assert message in said


def test_a_sample_has_so_many_labels_and_no_more() -> None:
    most = MOST_TASKS - len(TASKS)
    names = [f"task{number}" for number in range(most + 1)]
    assert code_dtype(len(defined_in({"define_tasks": dict.fromkeys(names[:most], LANES)}, "file"))).itemsize == 8
    assert f"there may be {most}" in refusal(dict.fromkeys(names, LANES))


def test_reserved_names_are_those_of_shards_and_of_the_container_of_heads() -> None:
    assert {IMAGE_FIELD, MASK_FIELD, META_FIELD} == RESERVED_MEMBERS
    container = nn.ModuleDict()
    for name in dir(container):
        if name[0].isalpha() and name.islower():
            assert name in RESERVED_WORDS, name


_CLASSES = st.lists(
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).filter(lambda name: not name.isdecimal()),
    min_size=2, max_size=20, unique=True,
).filter(lambda names: "void" not in names)  # fmt: skip
_POSITIVE = st.floats(1e-6, 255.0)
_DEFINITIONS = st.one_of(
    st.fixed_dictionaries({"like": st.sampled_from(["semseg", "human_parts"]), "class_names": _CLASSES},
                          optional={"invalid": st.integers(20, 255)}),
    st.fixed_dictionaries({"like": st.sampled_from(["class_scene", "class_object"]), "class_names": _CLASSES},
                          optional={"metrics": st.sampled_from([["accuracy"], ["cross_entropy", "accuracy"]])}),
    st.fixed_dictionaries({"like": st.sampled_from(["depth_zbuffer", "depth_euclidean"])},
                          optional={"codes_per_metre": _POSITIVE, "invalid": st.integers(0, 65535),
                                    "loss": st.sampled_from(["l1", "l2"])}),
    st.fixed_dictionaries({"like": st.sampled_from(["keypoints2d", "edge_occlusion", "reshading"])},
                          optional={"scale": _POSITIVE, "clip": st.booleans(), "blur_fraction": st.floats(0, 0.5),
                                    "invalid": st.integers(0, 255)}),
    st.fixed_dictionaries({"like": st.just("principal_curvature")},
                          optional={"mean": st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2),
                                    "std": st.lists(_POSITIVE, min_size=2, max_size=2)}),
    st.fixed_dictionaries({"like": st.sampled_from(sorted(TASKS))}),
)  # fmt: skip


@given(_DEFINITIONS)
def test_a_definition_comes_back_from_its_row_json_and_yaml(values: dict[str, Any]) -> None:
    definition = TaskDefinition.model_validate(values)
    spec = derive_tasks({"mine": definition})["mine"]
    again = definitions_of([TASKS["normal"], spec])
    assert set(again) == {"mine"}
    assert derive_tasks(again)["mine"] == spec
    stored = json.loads(json.dumps(definition.model_dump(mode="json")))
    assert stored.keys() == values.keys()
    assert TaskDefinition.model_validate(stored) == definition
    config = RunConfig.model_validate({"define_tasks": {"mine": values}, "tasks": ["mine"]})
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config
    assert config.task_specs == (spec,)


@given(_DEFINITIONS)
def test_a_defined_task_has_a_row_as_consistent_as_those_of_the_table(values: dict[str, Any]) -> None:
    spec = derive_tasks({"mine": TaskDefinition.model_validate(values)})["mine"]
    row = TASKS[values["like"]]
    assert (spec.dense, spec.target, spec.picture, spec.oriented) == (row.dense, row.target, row.picture, row.oriented)
    assert not spec.class_names or len(spec.class_names) == spec.channels
    assert spec.dense or spec.encoding.channels == spec.channels
    assert spec.encoding.invalid is None or spec.interpolation == "nearest"
    assert sum(1 for _ in make_head(spec, width=8, patch_size=4, grid=2).parameters()) > 0


def test_only_what_is_stored_can_contradict() -> None:
    lanes = defined(**LANES)
    assert contradiction(lanes, lanes) is None
    assert contradiction(lanes, defined(**{**LANES, "class_names": ["lane", "road", "curb"]})) == "class_names"
    assert contradiction(lanes, defined(**LANES, invalid=3)) == "invalid"
    assert contradiction(lanes, defined(**{**WEATHER, "class_names": LANES["class_names"]})) == "like"
    depth = {"like": "depth_zbuffer"}
    assert contradiction(defined(**depth), defined(**depth, codes_per_metre=64)) == "codes_per_metre"
    assert contradiction(defined(**depth), defined(**depth, loss="l2", metrics=["l1"])) is None


RECIPE = """
define_tasks:
  lanes: {like: semseg, class_names: [road, lane, curb]}
  weather: {like: class_scene, class_names: [sun, rain, snow]}
tasks: [depth_zbuffer, lanes, weather]
train: {task_weights: {lanes: 2.0}}
"""


def test_a_recipe_uses_what_it_defines(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE)
    config = load_config(recipe, ["define_tasks.lanes.invalid=250"])
    assert [spec.name for spec in config.task_specs] == ["depth_zbuffer", "lanes", "weather"]
    assert config.task_specs[1].encoding.invalid == 250
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks=[lane]", "unknown task 'lane': did you mean 'lanes'?"),
        ("define_tasks.lanes.losss=l1", "override 'define_tasks.lanes.losss=l1': unknown key"),
        ("define_tasks.lanes.loss=l1", "override 'define_tasks.lanes.loss=l1': define_tasks.lanes: loss l1 does not"),
        ("define_tasks.rgb={like: semseg}", "define_tasks: 'rgb' means something else"),
        ("train.task_weights.lane=1", "train.task_weights.lane: unknown task 'lane': did you mean 'lanes'?"),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe_name_the_file_or_override_and_the_key(
    override: str, message: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(UserError) as caught:
        load_config(recipe, [override])
    assert message in str(caught.value)


def test_shards_are_asked_only_for_tasks_that_the_recipe_leaves_open(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE)
    rainy = TaskDefinition(like="class_scene", class_names=("dry", "wet"))
    asked: list[str] = []

    def of_shards(data: Any) -> dict[str, TaskDefinition]:
        asked.append(data.train)
        return {"wetness": rainy, "weather": rainy}

    load_config(recipe, [], of_shards)
    assert asked == []
    config = load_config(recipe, ["tasks=[lanes, wetness]", "data.train=there"], of_shards)
    assert asked == ["there"]
    assert config.define_tasks["wetness"] == rainy
    assert config.define_tasks["weather"].class_names == ("sun", "rain", "snow"), "the recipe's own word counts"
    weighted = load_config(recipe, ["tasks=[lanes]", "data.task_shares.wetness=2"], of_shards)
    assert weighted.data.task_shares == {"wetness": 2.0}

    def nothing(data: Any) -> dict[str, TaskDefinition]:
        raise UserError("there are no shards")

    with pytest.raises(UserError, match=r"unknown task 'wetness'.*, nor do the training shards .*: there are no"):
        load_config(recipe, ["tasks=[wetness]"], nothing)
