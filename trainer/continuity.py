"""Whether a run folder may be continued with a given configuration, and whether all ranks have the same one."""

from pathlib import Path

import torch.distributed as dist

from configs.errors import UserError
from configs.load import differing_keys
from configs.schema import RunConfig
from trainer.distributed.agreement import on_all
from trainer.run_files import read_config

# What a run was trained with so far cannot change on the way.
_FIXED = ("define_tasks", "tasks", "seed", "model", "data", "optim")
# Where the same data lies (its fingerprint is in the checkpoint), how many processes load it, and how much damage is
# put up with, may.
_FREE = ("data.train", "data.val", "data.cache_dir", "data.cache_gib", "data.workers", "data.max_bad_samples")


def check_continues(run_dir: Path, config: RunConfig) -> None:
    """Check that `config` continues the run in `run_dir`; anything goes while the folder holds no checkpoint.

    Raises:
        UserError: it differs from the run's config.yaml in tasks, seed, model, data or optimizer; names the keys.
    """
    if not any((run_dir / "checkpoints").glob("step_*")) or not (run_dir / "config.yaml").is_file():
        return
    differing = [
        key for key in differing_keys(read_config(run_dir), config) if key.split(".")[0] in _FIXED and key not in _FREE
    ]
    if differing:
        raise UserError(
            f"{run_dir} holds a run with another {', '.join(differing)}: set what its config.yaml says, "
            "or choose another run_dir"
        )


def check_same_on_all(config: RunConfig, group: dist.ProcessGroup) -> None:
    """Check that no rank read another file or was given other overrides: their collectives would not fit.

    A collective call.

    Raises:
        UserError: a rank's configuration differs from rank 0's; names the keys.
    """
    first, *others = on_all(group, lambda: config)
    for rank, other in enumerate(others, start=1):
        if differing := differing_keys(first, other):
            raise UserError(
                f"rank {rank} has another {', '.join(differing)} than rank 0: start all ranks with the same "
                "configuration file and overrides"
            )
