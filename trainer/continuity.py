"""Whether a run folder may be continued with a given configuration, and whether all ranks have the same of both."""

import os
import secrets
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch.distributed as dist

from configs.atomic import write_text_atomically
from configs.errors import UserError
from configs.load import differing_keys
from configs.schema import RunConfig
from trainer.distributed.agreement import on_all, on_main
from trainer.run_files import read_config

# What a run was trained with so far cannot change on the way.
_FIXED = ("define_tasks", "tasks", "seed", "model", "data", "optim")
# Where the same data lies (its fingerprint is in the checkpoint), how many processes load it, and how much damage is
# put up with, may.
_FREE = ("data.train", "data.val", "data.cache_dir", "data.cache_gib", "data.workers", "data.max_bad_samples")
_TOKEN_FILE = ".shared"
_SEEN_WITHIN_SECONDS = 5.0  # a network file system may show a folder for a while as it was


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


def check_folder_shared(run_dir: Path, group: dist.ProcessGroup) -> None:
    """Check that all ranks see the same run folder: each finds there what rank 0 has just written; then that goes.

    A collective call.

    Raises:
        UserError: a rank has a folder of its own, or rank 0 cannot write; the same on all ranks.
    """
    path = run_dir / _TOKEN_FILE
    try:
        token = on_main(group, lambda: _write_token(path))
        found = on_all(group, partial(_find_token, path, token))
    finally:
        if dist.get_rank(group) == 0:
            with suppress(OSError):
                path.unlink()
    for rank, (sees, place) in enumerate(found):
        if not sees:
            raise UserError(
                f"rank {rank} does not see what rank 0 writes to the run folder ({place} and {found[0][1]}): set "
                "run_dir to an absolute path on a file system that all nodes mount"
            )


def _write_token(path: Path) -> str:
    token = secrets.token_hex(16)
    write_text_atomically(path, token)
    return token


def _find_token(path: Path, token: str) -> tuple[bool, str]:
    """Return whether this rank reads `token` at `path`, and where it has looked."""
    place = f"{path.parent.absolute()} on {os.uname().nodename}"
    deadline = time.monotonic() + _SEEN_WITHIN_SECONDS
    while True:
        with suppress(OSError):
            if path.read_bytes() == token.encode():
                return True, place
        if time.monotonic() > deadline:
            return False, place
        time.sleep(0.1)
