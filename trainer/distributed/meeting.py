"""Where the ranks of a run meet before there are process groups, and speak when one of them is lost.

One key-value store, which torchrun's agent holds, else rank 0; and a second one, on the last rank, that is told of
losses too and asked when the first is gone with its holder. Whoever asks is never kept waiting: the holder of a store
that does not answer is taken for gone. After a loss the roll is called, which a thread of every rank answers, as the
rank itself may compute, or wait for another that has not noticed yet.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

from torch.distributed import (  # type: ignore[attr-defined]  # public, but left out of the type stubs' exports
    PrefixStore,
    Store,
    TCPStore,
)

from cluster.env import RankEnv
from configs.errors import UserError

_ANSWER_SECONDS = 3.0
_SECOND_STORE_SECONDS = 10.0  # to connect to it; a run goes on without one
_LISTEN_SECONDS = 0.25  # between two looks of a rank whether the roll is called; more where there are many
_LOOKS_PER_SECOND = 1000  # that a store is asked for by all ranks together
_ROLL_SECONDS = 2.0  # from when all have looked until who has not answered is taken for gone
_LINGER_SECONDS = 2.0
_LINGER_AFTER_LOSS_SECONDS = 10.0  # the others may notice a loss later
_PAUSE_SECONDS = 0.05

Answer = TypeVar("Answer")


class Meeting:
    """The stores of one run, seen from one rank.

    Attributes:
        store: the first.
    """

    def __init__(self, env: RankEnv, timeout_seconds: float) -> None:
        """Find the first store.

        Raises:
            UserError: it cannot be reached in time, or its port is taken.
        """
        self._env, self._expected, self._linger_seconds = env, env.world, _LINGER_SECONDS
        self._timeout_seconds, self._deadline = timeout_seconds, time.monotonic() + timeout_seconds
        is_host = env.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            first = _open(env.master_addr, env.master_port, timeout_seconds, is_host=is_host)
        except RuntimeError as error:
            if is_host:
                raise UserError(
                    f"rank 0 cannot listen at {self._place}: set MASTER_PORT to a free port ({_first_line(error)})"
                ) from error
            raise UserError(
                f"rank {env.rank} of {env.world} found nobody at {self._place} within {timeout_seconds:g} s: check "
                f"that rank 0 was started and that this address is reachable ({_first_line(error)})"
            ) from error
        # The agent's store outlives the ranks that it starts again.
        self.store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", first)
        self._answering: list[Store] = [self.store]  # those not known to be gone; the first of them is asked
        self._held: list[Store] = [self.store] if is_host else []
        self._left, self._listeners = threading.Event(), list[threading.Thread]()
        self._listen_seconds = max(_LISTEN_SECONDS, env.world / _LOOKS_PER_SECOND)

    def wait_for_all(self) -> None:
        """Wait until all ranks are here.

        Raises:
            UserError: not all came in time; names those that did not.
        """
        world, come = self._env.world, 0
        with suppress(RuntimeError):  # the store is gone
            if self._env.rank == world - 1:
                self._offer_second_store()
            self.store.set(f"come/{self._env.rank}", "")
            come = self.store.add("come", 1)
            # Asked again and again, as a wait that ends in vain writes warnings of its own.
            while come < world and time.monotonic() < self._deadline:
                time.sleep(_PAUSE_SECONDS)
                come = self.store.add("come", 0)
        if come < world:
            missing = self._ask(lambda store: [rank for rank in range(world) if not store.check([f"come/{rank}"])])
            who = f"{named(missing)} of {world} did not come" if missing else "not all ranks came"
            raise UserError(
                f"{who} to {self._place} within {self._timeout_seconds:g} s: look at what was written there last, and "
                "check that all ranks were started"
            )
        self._find_second_store()
        self._listeners += [threading.Thread(target=self._listen, args=(s,), daemon=True) for s in self._answering]
        for listener in self._listeners:
            listener.start()

    def first_to(self, what: str) -> bool:
        """Whether no other rank has said so before; also True where no store answers."""

        def claim(store: Store) -> int:
            count: int = store.add(f"first/{what}", 1)
            return count

        count = self._ask(claim)
        if count == 1:
            for store in self._answering[1:]:  # for those who will find the first one gone
                _answer(store, claim)
        return count is None or count == 1

    def missing_ranks(self) -> list[int] | None:
        """Call the roll after a lost connection. Returns None where no store answers.

        Returns:
            The ranks that do not answer; where all do, those that have not noticed the loss: they hang.
        """
        told = [store for store in self._answering[::-1] if _answer(store, self._call_the_roll)]
        self._answering = told[::-1]
        if not self._answering:
            return None
        time.sleep(self._listen_seconds + _ROLL_SECONDS)
        gone, unaware = self._without("here"), self._without("lost")
        self._expected -= len(gone or ())
        self._linger_seconds = _LINGER_AFTER_LOSS_SECONDS
        return gone or unaware

    def leave(self) -> None:
        """Let go of the stores. The holder of the one that answers first waits a little for those who may still ask."""
        count = self._ask(lambda store: store.add("left", 1))
        deadline = time.monotonic() + self._linger_seconds
        while (
            count is not None
            and count < self._expected
            and self._answering[0] in self._held
            and time.monotonic() < deadline
        ):
            time.sleep(_PAUSE_SECONDS)
            count = self._ask(lambda store: store.add("left", 0))
        self._left.set()
        for listener in self._listeners:  # a thread that is still in a store when Python ends would abort the process
            listener.join(_ANSWER_SECONDS)

    @property
    def _place(self) -> str:
        return f"{self._env.master_addr}:{self._env.master_port}"

    def _offer_second_store(self) -> None:
        """Hold a second store on any free port, and say in the first where."""
        with suppress(OSError):
            address = _own_address(self._env)
            second = _open(address, 0, _SECOND_STORE_SECONDS, is_host=True)
            token = secrets.token_hex(8)
            second.set(token, "")
            self.store.set("second", f"{address} {second.port} {token}")
            self._held.append(second)
            self._answering.append(second)

    def _find_second_store(self) -> None:
        """Connect to it, unless it is held here or there is none."""
        with suppress(RuntimeError):
            if len(self._answering) == 1 and self.store.check(["second"]):
                address, port, token = self.store.get("second").decode().split()
                second = _open(address, int(port), _SECOND_STORE_SECONDS, is_host=False)
                if second.check([token]):  # not that of another run, at a loopback address of another machine
                    self._answering.append(second)

    def _listen(self, store: Store) -> None:
        """Answer when the roll is called."""
        with suppress(RuntimeError):  # the store is gone
            while not self._left.wait(self._listen_seconds):
                if store.check(["roll"]):
                    store.set(f"here/{self._env.rank}", "")
                    return

    def _call_the_roll(self, store: Store) -> bool:
        for key in (f"lost/{self._env.rank}", f"here/{self._env.rank}", "roll"):
            store.set(key, "")
        return True

    def _without(self, note: str) -> list[int] | None:
        """Return the ranks that have left no such note."""
        ranks = range(self._env.world)
        return self._ask(lambda store: [rank for rank in ranks if not store.check([f"{note}/{rank}"])])

    def _ask(self, question: Callable[[Store], Answer]) -> Answer | None:
        """Return the answer of the first store that gives one, or None; those that give none are not asked again."""
        while self._answering:
            if (answer := _answer(self._answering[0], question)) is not None:
                return answer
            self._answering.pop(0)
        return None


def _open(address: str, port: int, timeout_seconds: float, *, is_host: bool) -> TCPStore:
    return TCPStore(
        address,
        port,
        is_master=is_host,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _own_address(env: RankEnv) -> str:
    """Return the address by which this machine and that of rank 0 know each other."""
    family, kind, _, _, place = socket.getaddrinfo(env.master_addr, env.master_port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        return str(probe.getsockname()[0])


def _answer(store: Store, question: Callable[[Store], Answer]) -> Answer | None:
    """Return a store's answer, or None where it does not come in time."""
    answers: list[Answer] = []

    def ask() -> None:
        with suppress(RuntimeError):
            answers.append(question(store))

    # A holder that is stopped, not dead, would keep the question waiting for ever.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    return answers[0] if answers else None


def named(ranks: list[int]) -> str:
    """Return "rank 1" or "ranks 1, 2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
