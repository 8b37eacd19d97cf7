"""Who this process is in the world: rank, world size and rendezvous, from whichever launcher started it."""

import os
import socket
from dataclasses import dataclass

from configs.errors import UserError


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
    """Read torchrun's and the deepspeed launcher's variables, else SLURM's; without either, one process.

    Raises:
        UserError: variables that contradict each other or are incomplete.
    """
    if "RANK" in os.environ:
        return _from_variables("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        return _from_variables("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    return RankEnv(master_port=free_port())


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _from_variables(rank_name: str, world_name: str, local_rank_name: str) -> RankEnv:
    names = (rank_name, world_name, local_rank_name, "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in os.environ]:
        raise UserError(f"{rank_name} is set but {missing[0]} is not: start with torchrun, srun or `modsquad` alone")
    try:
        rank, world, local_rank, port = (
            int(os.environ[name]) for name in (rank_name, world_name, local_rank_name, "MASTER_PORT")
        )
    except ValueError as error:
        raise UserError(f"a launcher variable is not a number ({error}): look at {', '.join(names)}") from None
    if not 0 <= rank < world:
        raise UserError(f"{rank_name}={rank} does not fit {world_name}={world}")
    return RankEnv(
        rank=rank, world=world, local_rank=local_rank, master_addr=os.environ["MASTER_ADDR"], master_port=port
    )
