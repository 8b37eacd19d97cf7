"""Runs a function on n gloo ranks of this machine, so that every claim about ranks is an ordinary test.

Each rank is a process with one thread and its own copy of the arguments. A rank that fails ends the others and raises
here with its traceback; ranks that hang are ended after `timeout_seconds`.

Ranks are forks of a server that has imported torch and DeepSpeed and does nothing else: a rank that imports them itself
takes seconds. They share one seed of Python's hashes, unlike those of a launcher (`tests.trainer.rank_processes`), and
the first state of torch's generator.
"""

import functools
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed

_ROOT = Path(__file__).parent.parent
_SERVERS: "list[subprocess.Popen[bytes]]" = []
_IMPORTED = ("trainer.loop", "tests.trainer.worlds")


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout_seconds: float = 180.0) -> list[Any]:
    """Call `fn(rank, world, *args)` on `world` ranks of one gloo group and return the ranks' results in rank order.

    `fn` must be a module-level function; arguments and results must be picklable (tensors are copied). The ranks have
    this process's folder and environment. Raises RuntimeError with the traceback of every failed rank, TimeoutError
    when a rank does not finish in time.
    """
    # Plain pickle copies tensors; multiprocessing's own would share memory that dies with its process.
    call = _Call(pickle.dumps((fn, args)), world, timeout_seconds, os.getcwd(), {**os.environ, "OMP_NUM_THREADS": "1"})
    server = _server()
    try:
        server.send(call)
        answer = pickle.loads(server.recv_bytes())
    except BaseException:  # Such as a test's own time limit: this answer must not reach the next test.
        _server.cache_clear()
        server.close()
        raise
    if isinstance(answer, Exception):
        raise answer
    return [pickle.loads(result) for result in answer]


@dataclass(frozen=True)
class _Call:
    """What to run, pickled, on how many ranks, for how long, in which folder and environment."""

    function: bytes
    world: int
    timeout_seconds: float
    folder: str
    environment: dict[str, str]


@functools.cache
def _server() -> "connection.Connection[_Call, Any]":
    here, there = Pipe()
    command = f"from tests.ranks import serve; serve({there.fileno()})"
    # It ends when its pipe does, however this process ends.
    _SERVERS.append(subprocess.Popen([sys.executable, "-c", command], cwd=_ROOT, pass_fds=[there.fileno()]))
    there.close()  # So that the death of the server is seen as the end of its pipe.
    return here


def serve(descriptor: int) -> None:
    """Answer the calls that come through a pipe, until it ends."""
    caller: connection.Connection[Any, _Call] = connection.Connection(descriptor)
    for name in _IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    while True:
        try:
            call = caller.recv()
        except EOFError:
            return
        try:
            answer: Any = _run(call, caller)
        except (RuntimeError, TimeoutError) as error:
            answer = error
        caller.send_bytes(pickle.dumps(answer))


def _run(call: _Call, caller: "connection.Connection[Any, _Call]") -> list[bytes]:
    pids, receivers = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(call.world):
                receiver, sender = Pipe(duplex=False)
                if (pid := os.fork()) == 0:
                    _run_rank(call, rank, f"file://{folder}/rendezvous", sender)
                sender.close()  # So that the death of a rank is seen as the end of its pipe.
                pids.append(pid)
                receivers.append(receiver)
            return _collect(receivers, call.timeout_seconds, caller)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _collect(receivers: list[Any], timeout_seconds: float, caller: "connection.Connection[Any, _Call]") -> list[bytes]:
    """Results in rank order, or the tracebacks of the ranks that had failed when the first failure was seen."""
    deadline = time.monotonic() + timeout_seconds
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = connection.wait([*waiting, caller], max(0.0, deadline - time.monotonic()))
        if caller in ready:
            raise SystemExit  # Nobody waits for the results any more.
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


def _run_rank(call: _Call, rank: int, meeting: str, sender: Any) -> NoReturn:
    try:
        os.chdir(call.folder)
        os.environ.clear()
        os.environ.update(call.environment)
        fn, args = pickle.loads(call.function)
        torch.distributed.init_process_group(
            "gloo",
            init_method=meeting,
            rank=rank,
            world_size=call.world,
            timeout=timedelta(seconds=call.timeout_seconds),
        )
        answer = pickle.dumps((True, pickle.dumps(fn(rank, call.world, *args))))
        torch.distributed.barrier()  # Nobody closes its sockets while a slower rank still needs them.
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(answer)
    sender.close()
    os._exit(0)  # Skips the teardown of process groups, which may wait for a rank that failed.
