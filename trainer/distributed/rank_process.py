"""How a rank's process ends: one line for what the user should know, an exit status, and no process group left.

Of all ranks the first one with something to say says it, whichever launcher started them.
"""

import re
import sys
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

from cluster.env import RankEnv
from cluster.exit_status import LOST_STATUS, end_at_once
from configs.errors import UserError
from configs.schema import ParallelConfig, RunConfig
from trainer.distributed.agreement import on_each
from trainer.distributed.interruption import Interrupted
from trainer.distributed.meeting import named
from trainer.distributed.process_groups import current_meeting, join_world, leave_meeting
from trainer.engine import close_distributed

# In messages of gloo's; errors of NCCL and of the store have classes of their own.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "Application timeout")
# In those of NCCL that are about something else.
_NO_LOSS = re.compile("invalid (usage|argument)|cuda error|ncclInvalid|ncclUnhandledCuda", re.IGNORECASE)


def load_on_all(load: Callable[[], RunConfig], env: RankEnv) -> RunConfig:
    """Return `load()`, on every rank alike: what fails on one rank fails on all.

    Raises:
        UserError: some rank's configuration cannot be read, or the ranks could not meet.
    """
    if env.world == 1:
        return load()
    config, error = None, None
    try:
        config = load()
    except UserError as caught:
        error = caught
    join_world(env, (config.parallel if config else ParallelConfig()).timeout_seconds)

    def outcome() -> RunConfig:
        if config is None:
            assert error is not None, "one of the two"
            raise error
        return config

    assert dist.group.WORLD is not None, "join_world has made it"
    return on_each(dist.group.WORLD, outcome)


def run_to_the_end(action: Callable[[], object], env: RankEnv, *, debug: bool = False) -> int:
    """Run `action`, leave the process group and return the exit status of this process.

    Args:
        action: trains; what it made must not be in use elsewhere.
        env: this rank.
        debug: show the traceback of a UserError and of a lost connection.

    Returns:
        0; 2 after a UserError (1 with `debug`); 75 after the loss of another rank, which is worth another try; 128 +
        signal (130, 140, 143) after a signal.
    """
    status = _attempt(action, env, debug)
    if status == LOST_STATUS and torch.cuda.is_available():
        # To leave NCCL's groups is to wait for what was asked of them, which the lost rank will not answer.
        leave_meeting()
        end_at_once(status)
    close_distributed()
    return status


def _attempt(action: Callable[[], object], env: RankEnv, debug: bool) -> int:
    try:
        action()
    except Interrupted as interrupted:
        _say_once(f"{interrupted}; the same command goes on from there")
        return interrupted.exit_status
    except UserError as error:
        if debug:
            traceback.print_exc()
            return 1
        _say_once(f"error: {error}")
        return 2
    except Exception as error:
        if (lost := _lost_connection(error)) is None or env.world == 1:
            raise
        if debug:
            traceback.print_exc()
        _say_who_is_lost(env, lost)
        return LOST_STATUS
    return 0


def _say_once(text: str) -> None:
    meeting = current_meeting()
    if meeting is None or meeting.first_to("speak"):
        print(text, file=sys.stderr, flush=True)


def _say_who_is_lost(env: RankEnv, reason: str) -> None:
    meeting = current_meeting()
    missing = meeting.missing_ranks() if meeting else None
    if missing is None:
        who = f"the places where the ranks met (rank 0 or torchrun's agent, and rank {env.world - 1})"
    else:
        who = f"{named(missing)} of {env.world}" if missing else "the connection between the ranks"
    _say_once(
        f"error: rank {env.rank} lost {who} ({reason}): look at what was written there last; the same command goes on "
        "from the last checkpoint"
    )


def _lost_connection(error: BaseException) -> str | None:
    """Return what `error` says about a connection, or None if it says nothing of the kind."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError) and _tells_of_a_loss(seen):
            # Without gloo's place in its source, and its advice.
            return re.sub(r"^\[\S+\] |\. This is typically.*", "", str(seen).splitlines()[0])
        seen = seen.__cause__ or seen.__context__
    return None


def _tells_of_a_loss(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return not _NO_LOSS.search(str(error))
    return any(sign in str(error) for sign in _LOST)
