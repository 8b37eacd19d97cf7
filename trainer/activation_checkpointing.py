"""Trades time for memory: keep the inputs of the model's blocks only, and run each block again in backward.

Built on fairscale's checkpoint wrapper, which can also move those inputs to the CPU meanwhile. What router noise is
drawn from is an input of a block, so a block that runs again draws the same. Every rank recomputes its blocks in the
same order, hence the token exchanges of expert parallelism pair up in backward as they do in forward.
"""

from typing import Literal

from fairscale.nn.checkpoint import checkpoint_wrapper

from model.mod_squad import ModSquad


def checkpoint_blocks(model: ModSquad, mode: Literal["none", "recompute", "recompute_offload"]) -> None:
    """Wrap every block of `model` in place, as `train.activation_checkpointing` says; parameters keep their names."""
    if mode == "none":
        return
    for block in model.blocks:
        checkpoint_wrapper(block, offload_to_cpu=mode == "recompute_offload")
