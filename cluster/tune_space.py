"""What `modsquad tune` may change: settings that leave the global batch and the mathematics alone, and their values.

Only what fits the world, the experts and the batch is in a space, and of settings without effect on each other's
results (buckets of gradients where nothing is reduced in buckets) only one.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import get_args

from cluster.groups import Layout, accumulation_steps, check_experts
from configs.errors import UserError
from configs.schema import RunConfig, TrainConfig

Value = int | bool | str
Point = tuple[Value, ...]
"""One value for each key of a space, in their order."""

MICRO_BATCH, DTYPE, RECOMPUTE = "train.micro_batch", "train.dtype", "train.activation_checkpointing"
ZERO, EP_SIZE = "parallel.zero_stage", "parallel.ep_size"
BUCKET, OVERLAP, WORKERS = "parallel.bucket_elements", "parallel.overlap_communication", "data.workers"
TUNABLE = (MICRO_BATCH, EP_SIZE, ZERO, BUCKET, OVERLAP, RECOMPUTE, WORKERS, DTYPE)
_BUCKETS = (2_000_000, 10_000_000, 50_000_000, 200_000_000)
_WORKERS = (0, 1, 2, 4, 8)


@dataclass(frozen=True)
class Space:
    """Points to try.

    Attributes:
        values: key -> its values, from small to large where they have an order; keys with the configured value alone
            are left out.
        points: all combinations that can run, without those that repeat another's effect.
    """

    values: Mapping[str, tuple[Value, ...]]
    points: tuple[Point, ...]

    def named(self, point: Point) -> dict[str, Value]:
        """Return a point as key -> value."""
        return dict(zip(self.values, point, strict=True))

    def kept(self, fits: Callable[[Mapping[str, Value]], bool]) -> "Space":
        """Return the space without the points that do not fit.

        Raises:
            UserError: none does.
        """
        points = tuple(point for point in self.points if fits(self.named(point)))
        if not points:
            raise UserError(
                f"none of the {len(self.points)} settings fits the memory: take more or larger GPUs, or a smaller model"
            )
        return Space(self.values, points)


def search_space(
    config: RunConfig,
    world: int,
    *,
    gpus: bool,
    cores_per_rank: int,
    parameters: int,
    wanted: Mapping[str, Sequence[Value]],
) -> Space:
    """Return what to search for a run; the configured values are in it wherever `wanted` does not say otherwise.

    Args:
        config: the run; its train.images_per_step stays.
        world: ranks.
        gpus: whether they have GPUs: only there are overlapping and offloading worth a trial.
        cores_per_rank: CPU cores, of which loader processes are.
        parameters: of the model; no bucket is larger.
        wanted: key -> values to search instead of the usual ones; train.dtype is searched only here.

    Raises:
        UserError: a key that cannot be tuned, a value out of place, or none of the combinations can run.
    """
    for key in wanted:
        if key not in TUNABLE:
            near = get_close_matches(key, TUNABLE, n=1, cutoff=0.0)[0]
            raise UserError(f"--search {key}: not among what can be tuned, did you mean '{near}'?")
    usual = _usual_values(config, world, gpus, cores_per_rank, parameters)
    values = {key: tuple(wanted.get(key, usual.get(key, ()))) for key in TUNABLE}
    values = {
        key: candidates for key, candidates in values.items() if set(candidates) - {configured(config, key, world)}
    }
    for key, candidates in values.items():
        for value in candidates:
            with_value(config, {key: value})
    # What ZeRO 0 does not use has there one value, the configured one where it can be.
    idle = {key: _first(configured(config, key, world), values[key]) for key in (BUCKET, OVERLAP) if key in values}
    points, problem = [], "nothing to search"
    for point in itertools.product(*values.values()):
        named = dict(zip(values, point, strict=True))
        if named.get(ZERO, config.parallel.zero_stage) == 0 and any(named[key] != idle[key] for key in idle):
            continue
        try:
            check_runs(with_value(config, named), world)
        except UserError as error:
            problem = str(error)
        else:
            points.append(point)
    if not points:
        raise UserError(f"no combination can run: {problem}")
    return Space(values, tuple(points))


def configured(config: RunConfig, key: str, world: int) -> Value:
    """Return what the configuration says of a key; without a micro-batch, that of one pass per step."""
    section, _, name = key.partition(".")
    value: Value | None = getattr(getattr(config, section), name)
    return config.train.images_per_step // world if value is None else value


def with_value(config: RunConfig, changes: Mapping[str, Value]) -> RunConfig:
    """Return the configuration with other values of dotted keys of its sections.

    Raises:
        UserError: a value that the key does not take.
    """
    values = config.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    try:
        return RunConfig.model_validate(values)
    except ValueError:
        shown = ", ".join(f"{key}={value}" for key, value in changes.items())
        raise UserError(f"--search {shown}: this value does not fit the key") from None


def check_runs(config: RunConfig, world: int) -> None:
    """Check that a configuration fits the world, the experts and the global batch.

    Raises:
        UserError: it does not.
    """
    Layout(world, config.parallel.ep_size)
    check_experts(config.model, config.parallel.ep_size)
    accumulation_steps(config.train.images_per_step, config.train.micro_batch, world)


def _usual_values(
    config: RunConfig, world: int, gpus: bool, cores_per_rank: int, parameters: int
) -> dict[str, tuple[Value, ...]]:
    images, _ = accumulation_steps(config.train.images_per_step, None, world)
    recompute = get_args(TrainConfig.model_fields["activation_checkpointing"].annotation)
    usual: dict[str, Sequence[Value]] = {
        MICRO_BATCH: [number for number in range(1, images + 1) if images % number == 0],
        EP_SIZE: [number for number in range(1, world + 1) if world % number == 0],
        ZERO: (0, 1, 2),
        RECOMPUTE: recompute if gpus else recompute[:2],
        WORKERS: [number for number in _WORKERS if number <= cores_per_rank],
    }
    if world > 1:
        # Buckets that hold the whole model are alike: one of them is enough, the configured one if it does.
        whole = [size for size in (config.parallel.bucket_elements, *_BUCKETS) if size >= parameters]
        usual[BUCKET] = [*(size for size in _BUCKETS if size < parameters), *whole[:1]]
        if gpus:
            usual[OVERLAP] = (False, True)
    found = {}
    for key, values in usual.items():
        own = configured(config, key, world)
        found[key] = tuple(values) if own in values or isinstance(own, str) else tuple(sorted([*values, own]))
    return found


def _first(preferred: Value, values: tuple[Value, ...]) -> Value:
    return preferred if preferred in values else values[0]
