"""Is the port free at which the ranks of a job would meet, and do all ranks reach it?

Rank 0 listens there while the others try, each of which opens one connection and waits for the outcome.
"""

import os
import socket
import time
from contextlib import ExitStack, suppress

from cluster.doctor import Finding
from cluster.env import SLURM_PORTS, RankEnv

_PAUSE_SECONDS = 0.2
_ALL_HERE = b"+"
_RANGE = f"{SLURM_PORTS.start} to {SLURM_PORTS.stop - 1}"
_OPEN = (
    f"let TCP through between the nodes: {_RANGE}, of which a job takes one on its first node, and the ports that "
    "Linux hands out (sysctl net.ipv4.ip_local_port_range)"
)


def check_port(env: RankEnv, *, seconds: float = 60.0) -> tuple[bool, list[Finding]]:
    """Find out whether ranks can meet; all call it at about the same time.

    Args:
        env: this rank, and the place where ranks meet.
        seconds: how long ranks are waited for.

    Returns:
        Whether all ranks reach the port, the same on all; and what this rank has to tell about it.
    """
    return _listen(env, seconds) if env.is_main else _connect(env, seconds)


def _listen(env: RankEnv, seconds: float) -> tuple[bool, list[Finding]]:
    place, others = f"{socket.gethostname()}:{env.master_port}", env.world - 1
    with ExitStack() as sockets:
        try:
            listener = sockets.enter_context(socket.create_server(("", env.master_port), backlog=env.world))
        except OSError as error:
            advice = (
                "modsquad launch takes the next free port by itself; with srun alone, set MASTER_PORT to a free one"
            )
            return False, [Finding("port", "bad", f"{place}: {os.strerror(error.errno or 0)}", advice)]
        come = list[socket.socket]()
        deadline = time.monotonic() + seconds
        while len(come) < others and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with suppress(TimeoutError):
                come.append(sockets.enter_context(listener.accept()[0]))
        if len(come) < others:
            found = f"{len(come)} of {others} other ranks reached {place} within {seconds:g} s"
            return False, [Finding("port", "bad", found, _OPEN)]
        for connection in come:
            connection.sendall(_ALL_HERE)
    found = f"{place} is free, and all {env.world} ranks reach it"
    if "SLURM_JOB_ID" in os.environ and env.master_port in SLURM_PORTS:
        found += f"; each job takes its own of {_RANGE}"
    return True, [Finding("port", "good", found)]


def _connect(env: RankEnv, seconds: float) -> tuple[bool, list[Finding]]:
    place, problem = f"{env.master_addr}:{env.master_port}", ""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((env.master_addr, env.master_port), timeout=left)
        except OSError as error:  # rank 0 may start later
            problem = _explain(error)
            time.sleep(_PAUSE_SECONDS)
            continue
        with connection, suppress(OSError):
            connection.settimeout(seconds)
            return connection.recv(1) == _ALL_HERE, []
        return False, []
    found = f"rank {env.rank} on {socket.gethostname()} does not reach rank 0 at {place}: {problem}"
    return False, [Finding("port", "bad", found, _OPEN)]


def _explain(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name does not resolve ({error.strerror})"
    if isinstance(error, TimeoutError):
        return "no answer, as behind a firewall"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there, or a firewall refuses"
    return error.strerror or str(error)
