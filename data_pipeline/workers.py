"""The processes that read ahead for a trainer: how they start, and when they end."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

_SIGNALS_OF_SCHEDULERS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def worker_context() -> ForkServerContext:
    """Return the way workers start: forked from a clean server process.

    A fork of the trainer itself would copy it while threads of gloo, OpenMP and CUDA hold locks that nobody in the
    copy releases. A spawned worker imports torch anew; the server imports it once for all workers (two workers on two
    busy cores: first batch after 5 s, 0.3 s for every later loader; spawned: 10 s each time).
    """
    start_worker_server()
    return multiprocessing.get_context("forkserver")


def start_worker_server() -> None:
    """Start the server, if it does not run, without waiting for it.

    It needs a second or more to import torch. Called early, that passes while the trainer gets ready itself.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["data_pipeline.loader"])
    # Schedulers signal every process of a job, and the trainer still needs data until it reaches its step boundary. So
    # the server and its helper start with these signals blocked; the workers inherit that. One after the other, since
    # starting the helper unblocks some.
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_SCHEDULERS)
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def serve_the_trainer(worker: int) -> None:
    """Make this worker end when the trainer is gone, however it went, or when the trainer ends it; not otherwise.

    DataLoader's own watch compares the parent's process id, but the parent of a worker is the fork server, which lives
    as long as its workers do.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "runs in a worker"

    def end_with_trainer() -> None:
        trainer.join()
        os._exit(1)

    def obey_trainer() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
            pass
        os._exit(0)

    for watch in (end_with_trainer, obey_trainer):
        threading.Thread(target=watch, name=watch.__name__, daemon=True).start()
