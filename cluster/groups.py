"""Arithmetic of data and expert parallelism: which ranks hold which experts, who loads how many images.

The world is data parallel. Consecutive ranks form an expert-parallel group of `ep_size`; each of its ranks holds
E / ep_size experts of every expert layer. Ranks that hold the same experts, one per group, form an expert-data group.
"""

from dataclasses import dataclass

from configs.errors import UserError
from configs.schema import ModelConfig


@dataclass(frozen=True)
class Layout:
    """A world of `world` ranks in groups of `ep_size`.

    Raises:
        UserError: `ep_size` does not divide `world`.
    """

    world: int
    ep_size: int

    def __post_init__(self) -> None:
        if self.world % self.ep_size:
            raise UserError(
                f"parallel.ep_size {self.ep_size} does not divide the world of {self.world} "
                f"{'rank' if self.world == 1 else 'ranks'}: choose one of {_divisors(self.world)}"
            )

    def expert_rank(self, rank: int) -> int:
        """Place of `rank` inside its expert-parallel group; it holds experts [place * E / ep_size, ...)."""
        return rank % self.ep_size

    def expert_groups(self) -> list[list[int]]:
        """Ranks over which each expert layer is sharded."""
        return [list(range(first, first + self.ep_size)) for first in range(0, self.world, self.ep_size)]

    def expert_data_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts and average their gradients."""
        return [list(range(place, self.world, self.ep_size)) for place in range(self.ep_size)]


def check_experts(model: ModelConfig, ep_size: int) -> None:
    """Check that every kind of expert layer the model has can be sharded evenly.

    Raises:
        UserError: a number of experts that `ep_size` does not divide.
    """
    blocks = range(model.depth)
    for kind, experts, used in (
        ("attention_experts", model.attention_experts, any(map(model.has_expert_attention, blocks))),
        ("mlp_experts", model.mlp_experts, any(map(model.has_expert_mlp, blocks))),
    ):
        if used and experts % ep_size:
            raise UserError(
                f"model.{kind} {experts} is not divisible by parallel.ep_size {ep_size}: "
                f"choose ep_size among {_divisors(experts)} or another number of experts"
            )


def accumulation_steps(images_per_step: int, micro_batch: int | None, world: int) -> tuple[int, int]:
    """Split a global batch: return (images per rank and forward pass, forward passes per step).

    Raises:
        UserError: the global batch does not split evenly.
    """
    per_rank, rest = divmod(images_per_step, world)
    if rest:
        raise UserError(f"train.images_per_step {images_per_step} is not divisible by the world of {world} ranks")
    if micro_batch is None:
        return per_rank, 1
    if per_rank % micro_batch:
        raise UserError(
            f"train.micro_batch {micro_batch} does not divide the {per_rank} images per rank and step "
            f"(images_per_step {images_per_step} over {world} ranks)"
        )
    return micro_batch, per_rank // micro_batch


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]
