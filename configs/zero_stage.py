"""Which ZeRO stages a run may have."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator


def _refuse_stage_3(stage: Any) -> Any:
    """DeepSpeed asserts that no expert layer is there, and its AutoEP takes only experts and routers of its own."""
    if stage == 3:
        raise ValueError(
            "stage 3 does not take expert layers: choose 1 or 2, and let parallel.ep_size shard the experts"
        )
    return stage


ZeroStage = Annotated[Literal[0, 1, 2], BeforeValidator(_refuse_stage_3)]
