"""The costs that `modsquad train CONFIG --print` shows below the configuration."""

import re
from pathlib import Path

import pytest

from configs.load import dump_config, load_config
from model.cost import count_image_macs, count_macs, count_parameters, evaluate
from trainer.footprint.cost_table import cost_comment

# part, number, symbols of each, parameters, formula, MACs, formula, passes; columns are two blanks apart
ROW = re.compile(
    r"# (?P<part>[a-zA-Z ]+?) +(?P<number>\d+)  (?P<own>(?:[A-Z] \d+(?:, )?)*) +(?P<parameters>[\d,]+)  "
    r"(?P<formula>\S[^,]*?) +(?P<macs>[\d,]+)  (?P<macs_formula>\S[^,]*?) +(?P<passes>\d+)"
)


def symbols(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"\b(\w) (\d+)\b", text)}


def whole(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("recipe", ["quickstart", "baselines/mtl"])
def test_every_number_follows_from_what_stands_beside_it(recipe: str) -> None:
    config = load_config(recipe)
    text = cost_comment(config)
    shared = symbols(next(line for line in text.splitlines() if line.startswith("# Of every part: ")))
    rows = [match for line in text.splitlines() if (match := ROW.fullmatch(line))]
    assert len(rows) >= 10
    for row in rows:
        own = shared | symbols(row["own"])
        assert whole(row["parameters"]) == int(row["number"]) * evaluate(row["formula"], own)
        assert whole(row["macs"]) == int(row["number"]) * evaluate(row["macs_formula"], own)
    parameters = count_parameters(config.model, config.task_specs, config.data.image_size).total
    macs = count_image_macs(config.model, config.task_specs, config.data.image_size)
    assert sum(whole(row["parameters"]) for row in rows) == parameters
    assert sum(whole(row["macs"]) * int(row["passes"]) for row in rows) == macs
    assert f"\n# parameters: {parameters:,} = " in text
    assert f" with all tasks: {macs:,};" in text


def test_every_task_has_its_macs() -> None:
    config = load_config("quickstart")
    text = cost_comment(config)
    for spec in config.task_specs:
        assert re.search(rf"^# {spec.name} +{count_macs(config.model, spec, config.data.image_size):,} ", text, re.M)


def test_below_the_configuration_it_is_a_comment(tmp_path: Path) -> None:
    config = load_config("baselines/moe")
    file = tmp_path / "moe.yaml"
    file.write_text(f"{dump_config(config)}\n{cost_comment(config)}")
    assert load_config(file) == config
