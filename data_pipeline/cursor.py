"""Where a run is in its plan: one position, free of ranks, workers and batches."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from configs.errors import UserError
from data_pipeline.shards import ShardIndex


@dataclass(frozen=True)
class Cursor:
    """The position behind the last image that the optimizer has used.

    Attributes:
        position: images used since the start of the run.
        seed: of the plan.
        fingerprint: of the shards (`ShardIndex.fingerprint`).
    """

    position: int
    seed: int
    fingerprint: str

    @classmethod
    def start(cls, index: ShardIndex, seed: int) -> "Cursor":
        """Return the cursor of a new run."""
        return cls(0, seed, index.fingerprint)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "Cursor":
        """Return the cursor that `to_dict` described."""
        return cls(int(state["position"]), int(state["seed"]), str(state["fingerprint"]))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable description."""
        return asdict(self)

    def advanced(self, images: int) -> "Cursor":
        """Return the cursor after a step of `images` images, all ranks together."""
        return replace(self, position=self.position + images)

    def check(self, index: ShardIndex, seed: int) -> None:
        """Refuse to go on with other data or another seed, which would skip and repeat samples unseen.

        Raises:
            UserError: the shards or the seed differ from those of the checkpoint.
        """
        if index.fingerprint != self.fingerprint:
            raise UserError(
                f"the shards in {index.storage.place} changed since the checkpoint (fingerprint {index.fingerprint}, "
                f"was {self.fingerprint}): restore them, or start a new run"
            )
        if seed != self.seed:
            raise UserError(f"seed {seed} differs from the checkpoint's {self.seed}: use that, or start a new run")
