"""docs/paper.md points at what exists: files, functions, configuration keys, recipes; its sums add up."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from configs.load import RECIPES, load_config
from configs.schema import RunConfig
from model.cost import count_parameters

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "paper.md").read_text()
QUOTED = sorted(set(re.findall(r"`([^`\n]+)`", TEXT)))
FILES = [quoted for quoted in QUOTED if re.fullmatch(r"[\w/]+\.(py|yaml)(:[\w.]+)?", quoted)]
SECTIONS = {name for name, field in RunConfig.model_fields.items() if hasattr(field.annotation, "model_fields")}
KEYS = [quoted for quoted in QUOTED if quoted.partition(".")[0] in SECTIONS and re.fullmatch(r"\w+(\.\w+)+", quoted)]


@cache
def names_in(path: Path) -> set[str]:
    """Every function, class and constant of a module, those of classes with the class in front."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                names.add(prefix + node.name)
            elif isinstance(node, ast.ClassDef):
                names.add(prefix + node.name)
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(path.read_text()).body, "")
    return names


@pytest.mark.parametrize("reference", FILES)
def test_files_and_what_they_define_exist(reference: str) -> None:
    file, _, name = reference.partition(":")
    assert (ROOT / file).is_file(), reference
    assert not name or name in names_in(ROOT / file), reference


@pytest.mark.parametrize("key", KEYS)
def test_configuration_keys_exist(key: str) -> None:
    section, _, field = key.partition(".")
    annotation = RunConfig.model_fields[section].annotation
    assert field in annotation.model_fields  # type: ignore[union-attr]


def test_the_map_names_the_subjects_and_every_baseline() -> None:
    assert len(FILES) > 40
    assert len(KEYS) > 20
    baselines = {f"configs/{path.relative_to(RECIPES)}" for path in (RECIPES / "baselines").glob("*.yaml")}
    assert baselines <= set(FILES)


def table(first_cell: str) -> list[list[str]]:
    """The rows of the table whose header begins with this cell."""
    lines = TEXT[TEXT.index(f"| {first_cell} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_parameters_are_ours_and_add_up_to_the_published_ones() -> None:
    *parts, total, published = (row[1:] for row in table("parameters"))
    dense = ["model.placement=dense", "model.head_width=64"]
    recipes = [("taskonomy_small", []), ("taskonomy_base", []), ("taskonomy_small", dense), ("taskonomy_base", dense)]
    for column, (recipe, overrides) in enumerate(recipes):
        config = load_config(recipe, overrides)
        numbers = [int(part[column].replace(",", "")) for part in parts]
        assert numbers[0] == count_parameters(config.model, config.task_specs, config.data.image_size).total
        assert sum(numbers) == int(total[column].replace(",", ""))
        assert f"{sum(numbers) / 1e6:.2f} M" == published[column]
