"""What a model costs: parameters and multiply-accumulates, counted from its configuration.

A multiply-accumulate (MAC) is one product and one sum; only matrix products are counted, as is usual for the published
numbers. N patch tokens, D width, p patch side, E experts of a layer, K chosen, d attention head width, h dense heads,
H hidden width, G dense hidden width, T tasks, C channels of a task. Parameters, and MACs per token of one task's pass:

    patch embedding     3 p^2 D + D                       3 p^2 D
    positions           N D                               0
    task embedding      T D                               0
    two norms           4 D                               0
    router              T D E (2 T D E with noise)        D E
    expert attention    2 E D d + 2 D d + 2 d             2 K D d + 2 D d + 2 N K d
    dense attention     4 D h d + 3 h d + D               4 D h d + 2 N h d
    expert MLP          2 E D H + E (H + D)               2 K D H
    dense MLP           2 D G + G + D                     2 D G
    dense head          2 D + D p^2 C + p^2 C             D p^2 C
    vector head         2 D + D C + C                     D C / N

A router that sees no task counts with T = 1. Extraction lowers T to 1 and E to the kept experts, except in the router,
which keeps its full width; MACs stay, as every token still uses K experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from configs.schema import ModelConfig
from configs.tasks import TaskSpec
from model.layer_routing import ExpertLayerInfo
from model.vit import Kept, block_layers


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by purpose.

    Attributes:
        dense: patch embedding, positions, norms of blocks, dense attention and MLPs, keys and values of expert
            attention.
        experts: experts of all layers.
        routers: routers of all layers and tasks.
        tasks: task embeddings and heads.
    """

    dense: int
    experts: int
    routers: int
    tasks: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts + self.routers + self.tasks


def count_parameters(
    config: ModelConfig, tasks: Sequence[TaskSpec], image_size: int, *, kept: Kept | None = None
) -> ParameterCount:
    """Return the parameters of a model, over all ranks.

    Args:
        config: sizes.
        tasks: the tasks that it serves.
        image_size: side of the square input in pixels.
        kept: experts that each expert layer holds; None: all.
    """
    D, p, d = config.width, config.patch_size, config.attention_head_width
    tokens = (image_size // p) ** 2
    dense = 3 * p**2 * D + D + tokens * D
    experts = routers = 0
    for index in range(config.depth):
        layers = {info.kind: info for info in block_layers(config, index)}
        dense += 4 * D
        dense += 2 * D * d + 2 * d if "attention" in layers else _dense_attention(config)
        dense += 0 if "mlp" in layers else 2 * D * config.dense_hidden + config.dense_hidden + D
        for info in layers.values():
            num_experts = len(kept[info.name]) if kept and info.name in kept else info.num_experts
            experts += num_experts * _one_expert(config, info)
            rows = len(tasks) if info.sees_task else 1
            routers += rows * D * info.num_experts * (2 if config.router_noise else 1)
    embeddings = 0 if config.task_embedding == "none" else len(tasks) * D
    heads = sum(2 * D + (D + 1) * spec.channels * (p**2 if spec.dense else 1) for spec in tasks)
    return ParameterCount(dense=dense, experts=experts, routers=routers, tasks=embeddings + heads)


def count_macs(config: ModelConfig, task: TaskSpec, image_size: int) -> int:
    """Return the MACs that one image costs for one task, from pixels to prediction; the same before and after
    extraction.

    Args:
        config: sizes.
        task: the task.
        image_size: side of the square input in pixels.
    """
    D, p, d = config.width, config.patch_size, config.attention_head_width
    N = (image_size // p) ** 2
    per_token = 3 * p**2 * D
    for index in range(config.depth):
        layers = {info.kind: info for info in block_layers(config, index)}
        if attention := layers.get("attention"):
            K = attention.top_k
            per_token += D * attention.num_experts + 2 * K * D * d + 2 * D * d + 2 * N * K * d
        else:
            per_token += 4 * D * config.heads * d + 2 * N * config.heads * d
        if mlp := layers.get("mlp"):
            per_token += D * mlp.num_experts + 2 * mlp.top_k * D * config.expert_hidden
        else:
            per_token += 2 * D * config.dense_hidden
    head = N * D * p**2 * task.channels if task.dense else D * task.channels
    return N * per_token + head


def _dense_attention(config: ModelConfig) -> int:
    inner = config.heads * config.attention_head_width
    return 4 * config.width * inner + 3 * inner + config.width


def _one_expert(config: ModelConfig, info: ExpertLayerInfo) -> int:
    if info.kind == "attention":
        return 2 * config.width * config.attention_head_width
    return 2 * config.width * config.expert_hidden + config.expert_hidden + config.width
