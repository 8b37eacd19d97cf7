"""The shards of a run."""

from typing import Literal

from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.index import ShardIndex


def open_shards(config: RunConfig, split: Literal["train", "val"]) -> ShardIndex:
    """Return the index of a run's shards, checked against its tasks.

    Raises:
        UserError: as `ShardIndex.load`; the shards define one of the run's tasks otherwise; or no training sample has
            a label of a task that is to be trained.
    """
    index = ShardIndex.load(config.data.train if split == "train" else config.data.val, config.data)
    index.check_tasks(config.task_specs)
    trained = [spec.name for spec in config.task_specs if config.data.task_shares.get(spec.name, 1.0) > 0]
    if split == "train" and (absent := [name for name in trained if name not in index.tasks]):
        raise UserError(
            f"{index.storage.place}: no sample has a label of {', '.join(absent)}: leave that out of `tasks`, or take "
            f"shards that hold it (here are {', '.join(index.tasks) or 'no labels at all'})"
        )
    return index
