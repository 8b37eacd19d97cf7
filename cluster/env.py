"""Who this process is in the world: rank, world size and rendezvous, from whichever launcher started it."""

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError

_ANSWER_SECONDS = 10.0
_HOME = Path(__file__).parents[1]
SLURM_PORTS = range(20_000, 30_000)  # below the ports that Linux hands out by itself


@dataclass(frozen=True, kw_only=True)
class RankEnv:
    """The place of one process among all.

    Attributes:
        rank: index of this process, 0 .. world - 1.
        world: number of processes.
        local_rank: index on this machine; chooses the GPU.
        master_addr, master_port: where rank 0 listens for the rendezvous.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0

    def variables(self) -> dict[str, str]:
        """Return the environment variables that torch.distributed and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def detect() -> RankEnv:
    """Read torchrun's and the deepspeed launcher's variables, else those of srun; without any of them, one process.

    Under srun the first node of the step is the place to meet, and the port follows from the job's number, unless
    MASTER_ADDR and MASTER_PORT say otherwise. A batch script itself is no step, whatever the number of its tasks.

    Raises:
        UserError: variables that contradict each other or are incomplete.
    """
    if "RANK" in os.environ:
        return _from_variables(os.environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        variables = {**_slurm_rendezvous(), **os.environ}
        return _from_variables(variables, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return RankEnv(master_port=free_port())


def choose_gpu(local_rank: int, visible: int) -> int:
    """Return which of the `visible` GPUs belongs to a rank.

    A scheduler may show each rank its own GPU alone, which is number 0 whatever the local rank.

    Raises:
        UserError: there are too few.
    """
    if visible > 1 and local_rank >= visible:
        raise UserError(f"local rank {local_rank} has no GPU, for {visible} are visible: start at most {visible} ranks")
    return local_rank if visible > 1 else 0


def import_variables(home: Path = _HOME) -> dict[str, str]:
    """Return the environment variables by which a process imports this program from `home`; default: as this one does.

    Without them `python -m` takes packages of the same names from the folder that it is started in, if there are any.
    """
    path = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _slurm_rendezvous() -> dict[str, str]:
    """Return MASTER_ADDR and MASTER_PORT as far as SLURM's variables give them."""
    values = {}
    # A list of nodes reads "a,b" or "rack1-n[003-007,12],b"; rank 0 runs on the first.
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes and (first := re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)):
        values["MASTER_ADDR"] = _address_of("".join(part or "" for part in first.groups()))
    if (job := os.environ.get("SLURM_JOB_ID", "")).isdecimal():
        values["MASTER_PORT"] = str(SLURM_PORTS.start + int(job) % len(SLURM_PORTS))
    return values


def _address_of(node: str) -> str:
    """Return the node's name, or the address by which SLURM knows it where the name does not resolve.

    Ranks would wait for minutes, without a word, for a name that they cannot resolve.
    """
    with suppress(OSError):
        socket.getaddrinfo(node, None)
        return node
    with suppress(OSError, subprocess.SubprocessError):
        shown = subprocess.run(
            ["scontrol", "show", "node", node], capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True
        )
        if found := re.search(r"\bNodeAddr=(\S+)", shown.stdout):
            return found[1]
    return node


def _from_variables(variables: Mapping[str, str], rank_name: str, world_name: str, local_rank_name: str) -> RankEnv:
    names = (rank_name, world_name, local_rank_name, "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in variables]:
        raise UserError(f"{rank_name} is set but {missing[0]} is not: start with torchrun, srun or `modsquad` alone")
    try:
        rank, world, local_rank, port = (
            int(variables[name]) for name in (rank_name, world_name, local_rank_name, "MASTER_PORT")
        )
    except ValueError as error:
        raise UserError(f"a launcher variable is not a number ({error}): look at {', '.join(names)}") from None
    if not 0 <= rank < world:
        raise UserError(f"{rank_name}={rank} does not fit {world_name}={world}")
    return RankEnv(
        rank=rank, world=world, local_rank=local_rank, master_addr=variables["MASTER_ADDR"], master_port=port
    )
