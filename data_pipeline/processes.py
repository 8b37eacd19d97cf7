"""Run one task for many items in a few fresh processes that never outlive their parent.

Processes are spawned, so that no lock or thread of the parent is copied into them. Each one is handed an item at a
time. It is deaf to Ctrl-C, which the parent answers for all, and notices a parent that was killed at its next report.
"""

import itertools
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Literal, TypeVar

from configs.errors import UserError

_PATIENCE_SECONDS = 10.0
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Report = tuple[Literal["step", "done", "user_error", "fault"], str]
Item = TypeVar("Item")
Task = Callable[[Item, Callable[[], None]], None]
"""What to do for an item, called as `task(item, on_step)`; picklable. It calls `on_step` for every unit of progress."""


def run_in_processes(task: Task[Item], items: Iterable[Item], workers: int, on_step: Callable[[], None]) -> None:
    """Do `task` for every item, in the calling process if `workers` is 1.

    Args:
        task: what to do for each; every process is sent a copy.
        items: what to do; picklable, and not None. Each is asked for when a process is free, and sent to that one.
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
    rest = iter(items)
    first = list(itertools.islice(rest, workers))
    pairs = [context.Pipe() for _ in first]
    processes = [context.Process(target=_serve, args=(task, there), daemon=True) for _, there in pairs]
    try:
        with _interrupts_held(), _one_thread_each():
            for process, (_, there) in zip(processes, pairs, strict=True):
                process.start()
                there.close()  # Now only the child holds this end, so its death reads as the end of the file here.
        _hand_out(itertools.chain(first, rest), [here for here, _ in pairs], on_step)
    finally:
        for ends in pairs:
            for end in ends:
                end.close()
        for process in processes:
            if process.pid is not None:
                _end(process)


def _hand_out(
    items: Iterator[Item], connections: "list[Connection[Item, Report]]", on_step: Callable[[], None]
) -> None:
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


def _end(process: SpawnProcess) -> None:
    """Wait for a process whose pipe is closed: at its next report it tidies up and ends; one that hangs is stopped."""
    process.join(_PATIENCE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def _send_next(items: Iterator[Item], connection: "Connection[Item, Report]") -> bool:
    item = next(items, None)
    if item is None:
        return False
    with suppress(ConnectionError):  # Of a process that is gone, the end of the file is read next.
        connection.send(item)
    return True


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back; a process started meanwhile inherits that for life, so it is deaf from its first moment."""
    resource_tracker.ensure_running()  # The first process starts it, and its start lets interrupts through again.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Give numeric libraries of processes started meanwhile one thread, unless the user chose.

    As many threads as cores in each of as many processes would only get in each other's way.
    """
    unset = [name for name in _THREAD_SETTINGS if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, "1"))
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


def _serve(task: Task[Item], connection: "Connection[Report, Item]") -> None:
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
