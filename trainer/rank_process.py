"""How a rank's process ends: one line for what the user should know, an exit status, and no process group left."""

import sys
import traceback
from collections.abc import Callable

from configs.errors import UserError
from trainer.engine import close_distributed
from trainer.interruption import Interrupted


def run_to_the_end(action: Callable[[], object], *, is_main: bool, debug: bool = False) -> int:
    """Run `action`, leave the process group and return the exit status of this process.

    Args:
        action: trains; what it made must not be in use elsewhere.
        is_main: whether this rank speaks for all when training was interrupted.
        debug: show the traceback of a UserError.

    Returns:
        0; 2 after a UserError (1 with `debug`); 130 or 143 after a signal.
    """
    status = _attempt(action, is_main, debug)
    close_distributed()
    return status


def _attempt(action: Callable[[], object], is_main: bool, debug: bool) -> int:
    try:
        action()
    except Interrupted as interrupted:
        if is_main:
            print(f"{interrupted}; the same command goes on from there", file=sys.stderr)
        return interrupted.exit_status
    except UserError as error:
        if debug:
            traceback.print_exc()
            return 1
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
