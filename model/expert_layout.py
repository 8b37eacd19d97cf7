"""Where one rank of an expert group finds each expert of a layer: on the rank that owns it, or, shadowed, at home.

Every rank owns equally many experts. The weights of a *shadowed* expert travel to all ranks of the group instead of its
tokens to its owner (dynamic shadowing: FasterMoE, He et al., PPoPP 2022, section 4.1); its gradients travel back. What
an expert computes is the same either way.

Shape legend: E experts of the layer, R ranks of the group, L = E / R experts owned by each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from configs.errors import UserError


@dataclass(frozen=True)
class ExpertLayout:
    """One rank's view of one layer. Without tables experts lie in order: rank r owns [r * L, (r + 1) * L).

    Attributes:
        num_experts: E.
        ranks: R; raises UserError where it does not divide E.
        rank: whose view it is.
        lent: (R,) shadowed experts of each owner.
        lent_numbers: those of this rank, as numbers among the L that it owns, ascending.
        owner_E: (E,) int64, the rank that serves this rank's tokens, for each expert.
        number_E: (E,) int64, its number there: below L where it is owned, from L on where it is shadowed.
    """

    num_experts: int
    ranks: int = 1
    rank: int = 0
    lent: tuple[int, ...] = ()
    lent_numbers: tuple[int, ...] = ()
    owner_E: Tensor | None = field(default=None, compare=False)
    number_E: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.num_experts % self.ranks:
            raise UserError(
                f"an expert layer of {self.num_experts} experts cannot be sharded over {self.ranks} ranks: choose an "
                f"ep_size that divides {self.num_experts}, or another number of experts"
            )

    @property
    def owned(self) -> range:
        """The places of the experts that this rank owns; their numbers too, while they lie in order."""
        local = self.num_experts // self.ranks
        return range(self.rank * local, (self.rank + 1) * local)

    @property
    def shadowed(self) -> int:
        """How many experts are shadowed."""
        return sum(self.lent)

    @property
    def present(self) -> int:
        """How many experts this rank computes with: its own, then all shadowed ones."""
        return self.num_experts // self.ranks + self.shadowed

    def find(self, expert_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rank that serves each of (C,) experts, and the expert's number there; both (C,) int64."""
        if self.owner_E is None or self.number_E is None:
            local = self.num_experts // self.ranks
            return expert_C // local, expert_C % local
        return self.owner_E[expert_C], self.number_E[expert_C]

    def placed(
        self, order: Sequence[int], shadowed: Sequence[int], device: torch.device | None = None
    ) -> "ExpertLayout":
        """Return the layout with experts elsewhere.

        Args:
            order: (E,) the expert at each place; rank r owns those at places [r * L, (r + 1) * L).
            shadowed: the experts whose weights travel.
            device: of the tables.
        """
        local = self.num_experts // self.ranks
        place_of = {expert: place for place, expert in enumerate(order)}
        lent = sorted(place_of[expert] for expert in shadowed)  # hence owner by owner, as their weights arrive
        owner_E = torch.tensor([place_of[expert] // local for expert in range(self.num_experts)])
        number_E = torch.tensor([place_of[expert] % local for expert in range(self.num_experts)])
        for number, place in enumerate(lent):
            owner_E[order[place]], number_E[order[place]] = self.rank, local + number
        owners = [place // local for place in lent]
        return ExpertLayout(
            num_experts=self.num_experts,
            ranks=self.ranks,
            rank=self.rank,
            lent=tuple(owners.count(rank) for rank in range(self.ranks)),
            lent_numbers=tuple(place % local for place in lent if place // local == self.rank),
            owner_E=owner_E.to(device),
            number_E=number_E.to(device),
        )
