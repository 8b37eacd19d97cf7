"""How a run is put onto a cluster: typed, with profiles in YAML (`configs/slurm/NAME.yaml`) and overrides on top."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from configs.errors import UserError
from configs.section import NonNegative, Positive, Section
from configs.yaml_files import explain, read_mapping

PROFILES = Path(__file__).parent / "slurm"


class LaunchConfig(Section):
    """What is asked of SLURM for one run. Names are those of sbatch's options where they mean the same."""

    nodes: Positive = 1
    """Machines."""
    gpus_per_node: NonNegative = 0
    """GPUs of each, one rank per GPU; 0: ranks on CPUs."""
    ranks_per_node: Positive | None = None
    """Ranks on each node; None: one per GPU, or one in all without GPUs. With GPUs it must be their number."""
    cpus_per_rank: Positive = 4
    """CPU cores of each rank, its loader processes included."""
    mem_gb: Positive | None = None
    """Memory of each node in GiB; None: the partition's default."""
    time: str = "24:00:00"
    """Time limit, as sbatch reads it: minutes, HH:MM:SS or D-HH:MM:SS."""
    partition: str | None = None
    """Partition, or several, separated by commas."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Nodes not to use."""
    slurm: dict[str, str | int | bool] = Field(default_factory=dict)
    """Any further option of sbatch: name without dashes in front -> value; true for one without a value."""
    setup: tuple[str, ...] = ()
    """Shell lines that the job runs on its first node before the ranks start, such as `module load cuda`."""
    python: str | None = None
    """Python that runs the ranks; None: the one that launches. Give the image's own with a container."""
    container_image: str | None = None
    """Image that pyxis starts every rank in."""
    container_mounts: tuple[str, ...] = ()
    """Mounts for it: SOURCE:TARGET[:FLAGS]. The run folder is mounted without being named."""
    grace_seconds: Annotated[int, Field(ge=10)] = 120
    """SLURM warns the ranks so long before the time limit; they save a checkpoint and leave."""
    max_requeues: NonNegative = 50
    """A job that was warned, preempted, or lost a rank goes back into the queue at most so often."""
    array_parallelism: Positive = 16
    """Runs of a sweep that may be running at the same time."""

    @model_validator(mode="after")
    def _check(self) -> "LaunchConfig":
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"ranks_per_node {self.ranks_per_node} differs from gpus_per_node {self.gpus_per_node}: a rank has one "
                "GPU; leave ranks_per_node out"
            )
        if self.container_mounts and not self.container_image:
            raise ValueError("container_mounts needs container_image")
        minutes_of(self.time)
        return self

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1


def minutes_of(time: str) -> int:
    """Return the whole minutes of a time limit, rounded up.

    Raises:
        ValueError: it is not of a form that sbatch reads.
    """
    days, dash, clock = time.rpartition("-")
    fields = clock.split(":")
    if not all(field.isdecimal() for field in (*fields, days if dash else "0")) or len(fields) > 3:
        raise ValueError(f"time '{time}' is not of the form minutes, HH:MM:SS or D-HH:MM:SS")
    numbers = [int(field) for field in fields]
    if days:  # D-HH, D-HH:MM, D-HH:MM:SS
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # MM, MM:SS
        hours, minutes, seconds = 0, *(*numbers, 0)[:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total <= 0:
        raise ValueError(f"time '{time}' must be longer than nothing")
    return -(-total // 60)


def load_launch(profile: str | Path | None, overrides: Mapping[str, Any]) -> LaunchConfig:
    """Read a profile and apply overrides.

    Args:
        profile: a YAML file, the name of a shipped profile, or None for the defaults.
        overrides: field -> value; None values are left out, `slurm` is merged and `setup` appended.

    Raises:
        UserError: no such profile, an unknown key, or a value that does not fit.
    """
    path = None if profile is None else _find_profile(profile)
    values = {} if path is None else read_mapping(path)
    for name, given in overrides.items():
        if given is None:
            continue
        match name, values.get(name):
            case "slurm", dict(kept):
                values[name] = {**kept, **given}
            case "setup", list(kept):
                values[name] = [*kept, *given]
            case "slurm" | "setup", _ if name in values:
                pass  # What the profile says fits nothing, as will be said.
            case _:
                values[name] = given
    try:
        return LaunchConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, LaunchConfig, str(path or "launch"))) from None


def _find_profile(profile: str | Path) -> Path:
    path = Path(profile)
    if path.is_file():
        return path
    shipped = PROFILES / f"{profile}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(found.stem for found in PROFILES.glob("*.yaml"))
    (near,) = get_close_matches(path.stem, names, n=1, cutoff=0.0)
    raise UserError(f"no cluster profile at '{profile}': did you mean '{near}'? Shipped: {', '.join(names)}")
