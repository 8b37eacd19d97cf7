"""Recipes whose tasks the shards define: what a recipe leaves unsaid of its tasks is read from the index of its shards.

A resolved configuration holds all definitions, so a run's own config.yaml needs no shards to be read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.load import load_config
from configs.schema import DataConfig, RunConfig
from configs.task_definitions import TaskDefinition, definitions_of
from data_pipeline.index import ShardIndex


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a recipe; shards are opened only where it names tasks that it does not define.

    Raises:
        UserError: as `configs.load.load_config`.
    """
    return load_config(source, overrides, _definitions_of_shards)


def _definitions_of_shards(data: DataConfig) -> Mapping[str, TaskDefinition]:
    return definitions_of(ShardIndex.load(data.train, data).task_table.values())
