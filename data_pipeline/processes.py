"""Run one task for many items in a few fresh processes that never outlive their parent.

Processes are spawned, so that no lock or thread of the parent is copied into them. Each one is handed an item at a
time. It is deaf to Ctrl-C, which the parent answers for all, and notices a parent that was killed at its next report.
"""

import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Literal

from configs.errors import UserError

Report = tuple[Literal["step", "done", "user_error", "fault"], str]
Task = Callable[[int, Callable[[], None]], None]
"""What to do for an item, called as `task(item, on_step)`; picklable. It calls `on_step` for every unit of progress."""


def run_in_processes(task: Task, items: Sequence[int], workers: int, on_step: Callable[[], None]) -> None:
    """Do `task` for every item, in the calling process if `workers` is 1.

    Args:
        task: what to do for each.
        items: what to do; handed out in order, to whoever is free.
        workers: number of processes.
        on_step: called here for every step reported there.

    Raises:
        UserError: the first one that a task raised, or a process that was killed from outside.
        RuntimeError: another exception of a task, with its traceback.
    """
    if workers == 1:
        for item in items:
            task(item, on_step)
        return
    context = get_context("spawn")
    pairs = [context.Pipe() for _ in range(min(workers, len(items)))]
    processes = [context.Process(target=_serve, args=(task, there), daemon=True) for _, there in pairs]
    try:
        with _interrupts_held():
            for process, (_, there) in zip(processes, pairs, strict=True):
                process.start()
                there.close()  # Now only the child holds this end, so its death reads as the end of the file here.
        _hand_out(iter(items), [here for here, _ in pairs], on_step)
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _hand_out(items: Iterator[int], connections: "list[Connection[int, Report]]", on_step: Callable[[], None]) -> None:
    busy = {connection for connection in connections if _send_next(items, connection)}
    while busy:
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            try:
                kind, text = ready.recv()
            except (EOFError, ConnectionResetError):
                raise UserError(
                    "a worker process was killed from outside, most likely for memory: use fewer workers, then run it "
                    "again"
                ) from None
            match kind:
                case "step":
                    on_step()
                case "done":
                    if not _send_next(items, ready):
                        busy.discard(ready)
                case "user_error":
                    raise UserError(text)
                case "fault":
                    raise RuntimeError(f"a worker process failed:\n{text}")


def _send_next(items: Iterator[int], connection: "Connection[int, Report]") -> bool:
    item = next(items, None)
    if item is None:
        return False
    connection.send(item)
    return True


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back; a process started meanwhile inherits that for life, so it is deaf from its first moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(task: Task, connection: "Connection[Report, int]") -> None:
    """Body of a worker: ends when the parent does, since then the pipe breaks."""
    try:
        while True:
            item = connection.recv()
            try:
                task(item, lambda: connection.send(("step", "")))
                connection.send(("done", ""))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return
            except UserError as error:
                connection.send(("user_error", str(error)))
            except Exception:
                connection.send(("fault", traceback.format_exc()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
