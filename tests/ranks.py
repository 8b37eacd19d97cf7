"""Runs a function on n gloo ranks of this machine, so that every claim about ranks is an ordinary test.

Each rank is a spawned process with one thread and its own copy of the arguments. A rank that fails ends the others and
raises here with its traceback; ranks that hang are ended after `timeout_seconds`.
"""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from typing import Any
from unittest import mock

import torch
import torch.distributed


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout_seconds: float = 180.0) -> list[Any]:
    """Call `fn(rank, world, *args)` on `world` ranks of one gloo group and return the ranks' results in rank order.

    `fn` must be a module-level function; arguments and results must be picklable (tensors are copied). Raises
    RuntimeError with the traceback of every failed rank, TimeoutError when a rank does not finish in time.
    """
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        pipes = [spawn.Pipe(duplex=False) for _ in range(world)]
        call = pickle.dumps((fn, args))
        processes = [
            spawn.Process(target=_run_rank, args=(call, rank, world, folder, timeout_seconds, sender), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()  # so that the death of a rank is seen as the end of its pipe
            return _collect([receiver for receiver, _ in pipes], timeout_seconds)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _collect(receivers: list[connection.Connection], timeout_seconds: float) -> list[Any]:
    """Results in rank order, or the tracebacks of the ranks that had failed when the first failure was seen."""
    deadline = time.monotonic() + timeout_seconds
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(receivers)) if rank not in results]
            raise TimeoutError(f"ranks {late} did not finish within {timeout_seconds:g} s")
        failures = []
        for rank, receiver in enumerate(receivers):
            if receiver not in ready:
                continue
            try:
                ok, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ok, value = False, "the process died without a traceback"
            results[rank] = value
            if not ok:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            raise RuntimeError("\n".join(failures))
    return [results[rank] for rank in range(len(receivers))]


def _run_rank(
    call: bytes, rank: int, world: int, folder: str, timeout_seconds: float, sender: connection.Connection
) -> None:
    torch.set_num_threads(1)
    try:
        fn, args = pickle.loads(call)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_seconds),
        )
        # Plain pickle copies tensors; multiprocessing's own would share memory that dies with this process.
        answer = pickle.dumps((True, fn(rank, world, *args)))
        torch.distributed.barrier()  # nobody closes its sockets while a slower rank still needs them
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(answer)
    sender.close()
    os._exit(0)  # skips the teardown of process groups, which may wait for a rank that failed
