"""Where the ranks of a run meet before there are process groups, and speak when one of them is lost.

One key-value store, which torchrun's agent holds, else rank 0. Whoever asks it is never kept waiting: where it does not
answer, its holder is taken for gone.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from cluster.env import RankEnv
from configs.errors import UserError

_ANSWER_SECONDS = 3.0
_GRACE_SECONDS = 1.0  # between the first rank that notices the loss of another and the last
_LINGER_SECONDS = 2.0
_PAUSE_SECONDS = 0.05

Answer = TypeVar("Answer")


class Meeting:
    """The store of one run, seen from one rank."""

    def __init__(self, env: RankEnv, timeout_seconds: float) -> None:
        """Find the store.

        Raises:
            UserError: it cannot be reached in time, or its port is taken.
        """
        self._env, self._of_agent = env, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._expected, self._gone = env.world, False
        self._timeout_seconds, self._deadline = timeout_seconds, time.monotonic() + timeout_seconds
        try:
            self.store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but left out of the type stubs
                env.master_addr,
                env.master_port,
                is_master=self._is_host,
                timeout=timedelta(seconds=timeout_seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            if self._is_host:
                raise UserError(
                    f"rank 0 cannot listen at {self._place}: set MASTER_PORT to a free port ({_first_line(error)})"
                ) from error
            raise UserError(
                f"rank {env.rank} of {env.world} found nobody at {self._place} within {timeout_seconds:g} s: check "
                f"that rank 0 was started and that this address is reachable ({_first_line(error)})"
            ) from error

    def wait_for_all(self) -> None:
        """Wait until all ranks are here.

        Raises:
            UserError: not all came in time; names those that did not.
        """
        world, come = self._env.world, 0
        with suppress(RuntimeError):  # the store is gone
            self.store.set(f"come/{self._env.rank}", "")
            come = self.store.add("come", 1)
            # Asked again and again, as a wait that ends in vain writes warnings of its own.
            while come < world and time.monotonic() < self._deadline:
                time.sleep(_PAUSE_SECONDS)
                come = self.store.add("come", 0)
        if come < world:
            missing = self._ask(lambda: [rank for rank in range(world) if not self.store.check([f"come/{rank}"])])
            who = f"{named(missing)} of {world} did not come" if missing else "not all ranks came"
            raise UserError(
                f"{who} to {self._place} within {self._timeout_seconds:g} s: look at what was written there last, and "
                "check that all ranks were started"
            )

    def first_to(self, what: str) -> bool:
        """Whether no other rank has said so before; also True where the store is gone."""
        count = self._ask(lambda: self.store.add(f"first/{what}", 1))
        return count is None or count == 1

    def silent_ranks(self) -> list[int] | None:
        """After a lost connection: the ranks that do not notice it too; None where the store is gone."""
        if self._ask(lambda: self.store.add(f"lost/{self._env.rank}", 1)) is None:
            return None
        time.sleep(_GRACE_SECONDS)
        ranks = range(self._env.world)
        silent = self._ask(lambda: [rank for rank in ranks if not self.store.check([f"lost/{rank}"])])
        self._expected -= len(silent or ())
        return silent

    def leave(self) -> None:
        """Let go of the store. Its holder first waits a little for those who may still ask."""
        count = self._ask(lambda: self.store.add("left", 1))
        deadline = time.monotonic() + _LINGER_SECONDS
        while self._is_host and count is not None and count < self._expected and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
            count = self._ask(lambda: self.store.add("left", 0))

    @property
    def _is_host(self) -> bool:
        return self._env.is_main and not self._of_agent

    @property
    def _place(self) -> str:
        return f"{self._env.master_addr}:{self._env.master_port}"

    def _ask(self, question: Callable[[], Answer]) -> Answer | None:
        """Return the store's answer, or None where it does not come; after that it is not asked again."""
        answers: list[Answer] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(question())

        if not self._gone:
            # A holder that is stopped, not dead, would keep the question waiting for ever.
            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(_ANSWER_SECONDS)
        self._gone = not answers
        return answers[0] if answers else None


def named(ranks: list[int]) -> str:
    """Return "rank 1" or "ranks 1, 2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
