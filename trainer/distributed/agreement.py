"""What fails on one rank fails on all: errors are agreed at points that every rank passes, so that none waits in vain.

For what a single rank may meet and the user can mend: a damaged shard, a full disk. A rank that ends in any other way
is noticed by the others as a lost connection.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


def on_each(group: dist.ProcessGroup, action: Callable[[], Result]) -> Result:
    """Run `action` on every rank and return this rank's result; if it fails anywhere, all ranks raise that error.

    `action` holds no collective. A collective call: one number on the CPU where all goes well.
    """
    result, error = _attempt(action)
    failed = torch.tensor(int(error is not None))
    dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if failed:
        errors: list[Exception | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, error, group=group)
        raise error or next(filter(None, errors))
    return result  # type: ignore[return-value]  # without an error there is a result


def on_all(group: dist.ProcessGroup, action: Callable[[], Result]) -> list[Result]:
    """Run `action` on every rank and return all results, in rank order; if it fails anywhere, all ranks raise."""
    result = on_each(group, action)
    results: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(results, result, group=group)
    return results


def on_main(group: dist.ProcessGroup, action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and return its result on every rank; if it fails, all ranks raise."""
    results = on_all(group, lambda: action() if dist.get_rank(group) == 0 else None)
    result: Result = results[0]  # type: ignore[assignment]  # rank 0 has run the action
    return result


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error
