"""The shards of a run."""

from typing import Literal

from configs.schema import RunConfig
from data_pipeline.index import ShardIndex


def open_shards(config: RunConfig, split: Literal["train", "val"]) -> ShardIndex:
    """Return the index of a run's shards, checked against its tasks.

    Raises:
        UserError: as `ShardIndex.load`; or the shards define one of the run's tasks otherwise.
    """
    index = ShardIndex.load(config.data.train if split == "train" else config.data.val, config.data)
    index.check_tasks(config.task_specs)
    return index
