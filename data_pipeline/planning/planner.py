"""The plan that a configuration asks for."""

from collections.abc import Sequence

from configs.schema import DataConfig
from configs.tasks import TaskSpec
from data_pipeline.index import ShardIndex
from data_pipeline.planning.once import OncePlan
from data_pipeline.planning.plan import Plan
from data_pipeline.planning.quota import QuotaPlan


def make_plan(index: ShardIndex, config: DataConfig, tasks: Sequence[TaskSpec], seed: int) -> Plan:
    """Return the plan of `config` over these shards.

    Raises:
        UserError: the shards lack the labels that the plan needs.
    """
    names = [spec.name for spec in tasks]
    labels = index.labels(names)
    shares = [config.task_shares.get(name, 1.0) for name in names]
    window = config.shuffle_window_shards
    if config.balance == "quota":
        return QuotaPlan(index.shard_of, labels, seed=seed, shares=shares, window=window, task_names=names)
    return OncePlan(
        index.shard_of, labels, seed=seed, tasks_per_image=config.tasks_per_image, shares=shares, window=window
    )
