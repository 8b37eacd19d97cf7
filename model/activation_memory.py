"""What autograd keeps for backward: bytes of one forward pass, counted from the configuration, part by part.

Every term is a tensor that some operation of the model saves; tests compare the sum with what autograd really saves.
Left out are the few bytes per image, and rows that fill the runs of experts up (model.expert_runs).

Symbols: D width, K chosen experts of E, d head width, h heads, H and G hidden widths, V ranks that a token's experts
are on, X cells of a row that an exchange sends. Each number is of the activations' type (A), float32 (F) or int64 (I).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from configs.schema import ModelConfig
from configs.tasks import TaskSpec
from model.cost import count_expert_parameters
from model.layer_routing import ExpertLayerInfo
from model.vit import block_layers


@dataclass(frozen=True)
class _Numbers:
    """How many numbers of each type one token keeps."""

    A: float = 0.0
    F: float = 0.0
    I: float = 0.0  # noqa: E741 (the legend's letter)

    def __add__(self, other: "_Numbers") -> "_Numbers":
        return _Numbers(self.A + other.A, self.F + other.F, self.I + other.I)

    def bytes(self, item_bytes: int) -> float:
        return self.A * item_bytes + self.F * 4 + self.I * 8


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """Bytes of a forward pass over B images with all tasks: B * (blocks + rest).

    Attributes:
        blocks: kept by all blocks, per image; with recomputation their inputs only.
        rest: kept by patch embedding, heads and losses, per image.
        largest_block: kept by the block that keeps most, per image; with recomputation it comes on top in backward.
    """

    blocks: float
    rest: float
    largest_block: float


def activation_bytes(
    config: ModelConfig,
    tasks: Sequence[TaskSpec],
    image_size: int,
    *,
    item_bytes: int,
    pairs: int | None = None,
    ep_size: int = 1,
    load: float = 1.0,
    recompute: bool = False,
) -> ActivationBytes:
    """Return what one image with its tasks keeps.

    Args:
        config: sizes.
        tasks: of the run.
        image_size: side of the square input in pixels.
        item_bytes: of a weight and an activation: 4 for fp32, 2 for bf16.
        pairs: how many of the tasks each image serves; None: all.
        ep_size: ranks over which experts are sharded.
        load: assignments that this rank's experts serve, over an even share; matters with `ep_size` > 1.
        recompute: whether blocks run again in backward.
    """
    tokens = (image_size // config.patch_size) ** 2
    pairs = len(tasks) if pairs is None else pairs
    rows = [tokens * (1 if index < config.shared_blocks else pairs) for index in range(config.depth)]
    whole = [_block(config, index, ep_size, load).bytes(item_bytes) * count for index, count in enumerate(rows)]
    inputs = [config.width * item_bytes * count for count in rows]
    patch = _Numbers(A=3 * config.patch_size**2).bytes(item_bytes) * tokens
    heads = sum(_head(config, spec).bytes(item_bytes) for spec in tasks) * tokens * pairs / len(tasks)
    return ActivationBytes(
        blocks=sum(inputs if recompute else whole), rest=patch + heads, largest_block=max(whole, default=0.0)
    )


def loss_bytes(tasks: Sequence[TaskSpec], image_size: int) -> float:
    """Return what the losses of one image with all tasks keep: about three float32 numbers per predicted one."""
    return sum(3 * 4 * spec.channels * (image_size**2 if spec.dense else 1) for spec in tasks)


def present_weight_bytes(
    config: ModelConfig, *, item_bytes: int, ep_size: int, shadowed: int, recompute: bool = False
) -> float:
    """Return what one rank keeps of weights for backward where experts are shadowed (model.shadowing).

    In every expert layer, its own experts and the shadowed ones once more, side by side; with recomputation those of
    one block at a time.

    Args:
        config: sizes.
        item_bytes: of a weight.
        ep_size: ranks over which experts are sharded.
        shadowed: experts of each layer.
        recompute: whether blocks run again in backward.
    """
    if not shadowed:
        return 0.0
    of_blocks = [
        sum(
            (layer.num_experts // ep_size + shadowed) * count_expert_parameters(config, layer.kind)
            for layer in block_layers(config, index)
        )
        for index in range(config.depth)
    ]
    return float((max(of_blocks) if recompute else sum(of_blocks)) * item_bytes)


def ranks_visited(num_experts: int, top_k: int, ranks: int) -> float:
    """Return V: expected ranks that hold some of K distinct experts drawn evenly from E, over R ranks.

    R (1 - C(E - E/R, K) / C(E, K)): each rank holds none of them with that probability.
    """
    return ranks * (1 - comb(num_experts - num_experts // ranks, top_k) / comb(num_experts, top_k))


def _block(config: ModelConfig, index: int, ep_size: int, load: float) -> _Numbers:
    D, d, h, G = config.width, config.attention_head_width, config.heads, config.dense_hidden
    kept = _Numbers(A=2 * (D + 2))  # input, mean and deviation of both norms
    layers = {layer.kind: layer for layer in block_layers(config, index)}
    for layer in layers.values():
        kept += _Numbers(A=D, F=2 * layer.num_experts + 1, I=layer.top_k)  # norm's output; router
        if config.router_noise:
            kept += _Numbers(F=2 * layer.num_experts)  # noise, and what its deviation comes from
        kept += _experts(config, layer, ep_size, load)
    if "attention" not in layers:
        kept += _Numbers(A=D + 4 * h * d, F=h)
    if "mlp" not in layers:
        kept += _Numbers(A=D + 2 * G)
    return kept


def _experts(config: ModelConfig, layer: ExpertLayerInfo, ep_size: int, load: float) -> _Numbers:
    D, d, H, K = config.width, config.attention_head_width, config.expert_hidden, layer.top_k
    served = K * (load if ep_size > 1 else 1.0)  # assignments at this rank's experts, per token at home
    kept = _Numbers(A=served, I=4 * served + 1)  # gates and the order of work
    if layer.kind == "mlp":
        kept += _Numbers(A=served * H)
    else:
        kept += _Numbers(A=2 * K * d + 2 * d, F=K)
    if ep_size > 1:
        X = min(K, layer.num_experts // ep_size)
        V = ranks_visited(layer.num_experts, K, ep_size)
        kept += _Numbers(A=load * V * (D + 2 * X), I=3 * K + 3 * V + served)
        if layer.kind == "attention":
            kept += _Numbers(A=served * d)  # head outputs at the experts, beside those at home
    return kept


def _head(config: ModelConfig, spec: TaskSpec) -> _Numbers:
    D = config.width
    return _Numbers(A=2 * (D + 1)) if spec.dense else _Numbers(A=D + 2)
