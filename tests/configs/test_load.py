"""Recipes, overrides, and the one-line errors that name the nearest key and the file."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import RECIPES, differing_keys, dump_config, load_config, make_override, recipe_names
from configs.schema import RunConfig


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", [RECIPES / f"{name}.yaml" for name in recipe_names()], ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_by_name_and_by_path(path: Path) -> None:
    name = str(path.relative_to(RECIPES).with_suffix(""))
    assert load_config(name) == load_config(path)


def test_overrides_are_yaml_values_applied_in_order(tmp_path: Path) -> None:
    path = recipe(tmp_path, "model: {preset: tiny}\n")
    config = load_config(path, ["train.steps=200", "model.depth=6", "tasks=[normal, semseg]", "train.steps=300"])
    assert (config.train.steps, config.model.depth, config.tasks) == (300, 6, ("normal", "semseg"))
    assert load_config(path, ["data.tasks_per_image=null"]).data.tasks_per_image is None


@given(folder=st.text(st.characters()))
@example(folder="/runs/it's #1: [a], {b} & %d")
@example(folder="/runs/\N{GRINNING FACE}\udcff\x7f\x85")
@example(folder="12")
def test_an_override_made_of_a_value_gives_it_back(folder: str) -> None:
    overrides = [make_override("run_dir", folder), make_override("data.train", Path(folder))]
    config = load_config("quickstart", overrides)
    assert (config.run_dir, config.data.train) == (folder, str(Path(folder)))


def test_weights_and_shares_of_tasks_outside_the_run_are_kept(tmp_path: Path) -> None:
    path = recipe(tmp_path, "train: {task_weights: {normal: 2, depth_zbuffer: 3}}\n")
    assert load_config(path, ["tasks=[normal]"]).train.task_weights == {"normal": 2, "depth_zbuffer": 3}


@given(steps=st.integers(20, 10**6), lr=st.floats(1e-6, 1.0), seed=st.integers(0, 2**31), ep=st.sampled_from([1, 2, 4]))
def test_dump_and_load_give_an_equal_configuration(
    tmp_path_factory: pytest.TempPathFactory, steps: int, lr: float, seed: int, ep: int
) -> None:
    config = RunConfig.model_validate(
        {"seed": seed, "train": {"steps": steps}, "optim": {"lr": lr}, "parallel": {"ep_size": ep}}
    )
    path = recipe(tmp_path_factory.mktemp("config"), dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("optm: {lr: 1}", [], "recipe.yaml: unknown key 'optm', did you mean 'optim'?"),
        ("optim: {lrr: 1}", [], "recipe.yaml: unknown key 'optim.lrr', did you mean 'optim.lr'?"),
        ("", ["train.stepz=3"], "override 'train.stepz=3': unknown key 'train.stepz', did you mean 'train.steps'?"),
        ("", ["train.steps"], "neither of the form key.sub=value nor a .yaml file"),
        ("", ["train.steps=many"], "override 'train.steps=many': train.steps: "),
        ("tasks: [normal, dept_zbuffer]", [], "unknown task 'dept_zbuffer': did you mean 'depth_zbuffer'?"),
        ("tasks: [normal, normal]", [], "task 'normal' is given twice"),
        ("train: {task_weights: {semsegg: 2}}", [], "train.task_weights.semsegg: unknown task 'semsegg': did you mean"),
        ("", ["data.task_shares.normal=-1"], "override 'data.task_shares.normal=-1': data.task_shares.normal: "),
        ("matching: {task_prior: {normal: 0}}", [], "recipe.yaml: matching.task_prior.normal: "),
        ("matching: {task_prior: {norml: 1}}", [], "unknown task 'norml': did you mean 'normal'?"),
        ("train: {task_weights: {normal: .nan}}", [], "recipe.yaml: train.task_weights.normal: "),
        ("", ["seed=1", "train.steps=5"], "override 'train.steps=5': optim.warmup_steps 20 exceeds train.steps 5"),
        (
            "",
            ["model.width=64", "model.shared_blocks=5"],
            "override 'model.shared_blocks=5': model: shared_blocks 5 exceeds depth 4",
        ),
        ("", ["model.shared_blocks=4"], "model: task_embedding 'every_block' needs a block that is not shared"),
        ("model: {mlp_top_k: 9}", [], "mlp_top_k 9 exceeds mlp_experts 8"),
        ("data: {image_size: 60}", [], "data.image_size 60 is not a multiple of model.patch_size 8"),
        (
            "data: {balance: quota}",
            ["data.tasks_per_image=2"],
            "override 'data.tasks_per_image=2': data: tasks_per_image 2 does not go with balance: quota",
        ),
        ("", ["data.augment.zoom=[2, 1]"], "override 'data.augment.zoom=[2, 1]': data.augment: zoom [2, 1]: give the"),
        ("data: {augment: {crop_scale: [1, 2]}}", [], "data.augment: crop_scale 2 exceeds the image"),
        ("data: {augment: {flop: true}}", [], "unknown key 'data.augment.flop', did you mean 'data.augment.flip'?"),
        ("a: [", [], "recipe.yaml: not valid YAML at line 1"),
        ("- 1", [], "holds a list, expected keys and values"),
        ("train: {off: 3}", [], "recipe.yaml: key 'train.False' is not text"),
        ("", [f"seed={2**64}"], f"override 'seed={2**64}': seed: Input should be less than {2**64}"),
    ],
)
def test_mistakes_get_one_line_that_says_where(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(recipe(tmp_path, text), overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "culprit"),
    [
        (["data.train=rooms", "train.steps=2"], "override 'train.steps=2'"),
        (["model.depth=4", "optim.warmup_steps=200"], "override 'optim.warmup_steps=200'"),
        (["train={steps: 2}", "data.train=rooms"], "override 'train={steps: 2}'"),
        (
            ["train.steps=2", "train={log_every_steps: 1}", "optim.warmup_steps=101"],
            "override 'optim.warmup_steps=101'",
        ),
        (["train.steps=50", "layer.yaml"], "layer.yaml"),
        (["data.train=rooms", "tasks=[1]"], "override 'tasks=[1]'"),
        (["tasks=[norml]", "data.task_shares.normal=1"], "override 'tasks=[norml]'"),
        (["train.task_weights={norml: 2}"], "override 'train.task_weights={norml: 2}'"),
        (["data.augment.zoom=[2, x]"], "override 'data.augment.zoom=[2, x]'"),
        (["seed=1", "train={1: 2}"], "override 'train={1: 2}'"),
        (["optim.lr.peak=1"], "override 'optim.lr.peak=1'"),
    ],
)
def test_an_error_blames_the_override_that_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], culprit: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("layer.yaml").write_text("data: {val: rooms}\ntrain: {steps: 2}")
    with pytest.raises(UserError) as error:
        load_config(recipe(tmp_path, ""), overrides)
    assert str(error.value).startswith(f"{culprit}: ")


INNOCENT = (
    "data.train=x",
    "train.log_every_steps=1",
    "optim.lr=0.1",
    "model.depth=6",
    "seed=1",
    "matching={weight: 0}",
)


@given(overrides=st.permutations(INNOCENT), place=st.integers(0, len(INNOCENT)))
def test_an_error_blames_no_override_of_other_keys(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str], place: int
) -> None:
    path = recipe(tmp_path_factory.mktemp("config"), "train: {steps: 2}")
    guilty = [*overrides[:place], "train.steps=3", *overrides[place:]]
    for culprit, texts in ((str(path), overrides), ("override 'train.steps=3'", guilty)):
        with pytest.raises(UserError) as error:
            load_config(path, texts)
        assert str(error.value).startswith(f"{culprit}: optim.warmup_steps 20 exceeds train.steps ")


def test_a_missing_recipe_names_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean the recipe 'quickstart'"):
        load_config("quikstart")


def test_differing_keys_are_dotted() -> None:
    one = RunConfig()
    other = one.model_copy(update={"seed": 3, "train": one.train.model_copy(update={"steps": 7})})
    assert differing_keys(one, other) == ["seed", "train.steps"]


def test_a_recipe_extends_another_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {steps: 70, images_per_step: 4}\nmodel: {width: 64}\ntasks: [normal]")
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\ntrain: {images_per_step: 6}")
    (tmp_path / "last.yaml").write_text(f"extends: {tmp_path / 'middle.yaml'}\nmodel: {{depth: 2}}")
    config = load_config(tmp_path / "last.yaml", ["train.micro_batch=3"])
    assert (config.train.steps, config.train.images_per_step, config.train.micro_batch) == (70, 6, 3)
    assert (config.model.width, config.model.depth, config.tasks) == (64, 2, ("normal",))
    (tmp_path / "shipped.yaml").write_text("extends: quickstart\nseed: 5")
    assert load_config(tmp_path / "shipped.yaml") == load_config("quickstart", ["seed=5"])


def test_a_layer_is_merged_in_its_place_among_overrides(tmp_path: Path) -> None:
    path, layer = recipe(tmp_path, "train: {steps: 70, images_per_step: 4}\n"), tmp_path / "layer.yaml"
    layer.write_text("extends: below.yaml\ntrain: {images_per_step: 6}\nparallel: {zero_stage: 2}\n")
    (tmp_path / "below.yaml").write_text("seed: 9\nparallel: {ep_size: 2}\n")
    config = load_config(path, ["train.images_per_step=5", "train.micro_batch=3", str(layer), "parallel.zero_stage=0"])
    assert (config.train.steps, config.train.images_per_step, config.train.micro_batch) == (70, 6, 3)
    assert (config.parallel.zero_stage, config.parallel.ep_size, config.seed) == (0, 2, 9)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (None, "layer.yaml cannot be read: No such file or directory"),
        ("train: {stepz: 3}", "layer.yaml: unknown key 'train.stepz', did you mean 'train.steps'?"),
        ("train: {steps: many}", "layer.yaml: train.steps: "),
        ("- 1", "layer.yaml: holds a list, expected keys and values"),
        ("on: 3", "layer.yaml: key 'True' is not text, as YAML reads numbers, dates, on, off, yes and no: quote it"),
        ("train: {task_weights: {1: 3}}", "layer.yaml: key 'train.task_weights.1' is not text"),
        ("train: &a {b: *a}", "layer.yaml: not valid YAML: a number or a nesting beyond all bounds"),
    ],
)
def test_mistakes_in_a_layer_name_its_file(tmp_path: Path, layer: str | None, message: str) -> None:
    path = tmp_path / "layer.yaml"
    if layer is not None:
        path.write_text(layer)
    with pytest.raises(UserError) as error:
        load_config(recipe(tmp_path, ""), [str(path)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"recipe": "extends: nowhere.yaml"}, "recipe.yaml: extends: no configuration at 'nowhere.yaml'"),
        ({"recipe": "extends: recipe.yaml"}, "recipe.yaml extends this file itself"),
        ({"recipe": "extends: b.yaml", "b": "extends: recipe.yaml"}, "b.yaml: extends: "),
        ({"recipe": "extends: b.yaml", "b": "- 1"}, "b.yaml: holds a list, expected keys and values"),
    ],
)
def test_mistakes_in_what_a_recipe_extends(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "recipe.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
