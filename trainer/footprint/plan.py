"""What a run takes on a cluster before it starts: memory per GPU, bytes per step, and the layouts that fit.

Mathematics: ZeRO (arXiv 1910.02054) for weights, gradients and moments; rings of n ranks send (n - 1) / n of a buffer
per pass, and an all-reduce is two passes; all-to-all of rows that are sent once per rank, with routing drawn evenly.
Time is compute and then bytes, nothing overlapped: a ranking of layouts, not a prediction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.groups import Layout, accumulation_steps, check_experts
from configs.errors import UserError
from configs.schema import RunConfig
from model.activation_memory import activation_bytes, loss_bytes, present_weight_bytes, ranks_visited
from model.cost import count_parameters, model_costs
from model.vit import expert_layers

LOAD = 1.25
"""Work of the most loaded rank's experts over an even share, for which memory is planned."""
RESERVED_GIB = 2.0
"""Of every GPU: CUDA context, communication buffers, fragmentation."""
BUCKET_BYTES = 2 * 4
"""Of each element of `parallel.bucket_elements` in ZeRO: two buckets in fp32, at most as large as the model."""
PEAK = 1.35
"""Peak of activations over what is kept and worked on, for what allocators lose: on a CPU 1.35 and 1.36 were measured
with experts in 4 and 8 blocks, 1.08 without experts."""
EFFICIENCY = 0.4
"""Share of a GPU's peak FLOP/s that training reaches."""
GIB = 2**30
ZERO_STAGES = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a user says of the machines.

    Attributes:
        nodes, gpus_per_node: how many.
        memory_gib: of one GPU.
        bandwidth: bytes per second that a GPU sends to others of its node.
        network: bytes per second that a GPU sends to other nodes.
        flops: peak FLOP/s of a GPU in the run's precision.
    """

    nodes: int
    gpus_per_node: int
    memory_gib: float
    bandwidth: float
    network: float
    flops: float

    @property
    def world(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU: weights (with those of shadowed experts), gradients, masters and moments, activations' peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it, without what is reserved."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one GPU sends in one optimizer step.

    Attributes:
        all_to_all: tokens to experts and back, forward and backward.
        experts: gradients (and weights, in ZeRO 1 and 2) of experts, between the ranks that hold the same ones.
        dense: the same of everything else.
    """

    all_to_all: float
    experts: float
    dense: float


@dataclass(frozen=True, kw_only=True)
class PlannedLayout:
    """One way to run.

    Attributes:
        ep_size, zero_stage, micro_batch, accumulation: the layout.
        memory: of one GPU.
        traffic: of one GPU.
        seconds: of one step, nothing overlapped.
        fits: whether the memory is there.
    """

    ep_size: int
    zero_stage: int
    micro_batch: int
    accumulation: int
    memory: Memory
    traffic: Traffic
    seconds: float
    fits: bool


def plan_layouts(config: RunConfig, cluster: Cluster) -> list[PlannedLayout]:
    """Return, for every ep_size and ZeRO stage, the largest micro-batch that fits, or the smallest that does not.

    Raises:
        UserError: the global batch does not divide over the GPUs.
    """
    images, _ = accumulation_steps(config.train.images_per_step, None, cluster.world)
    return [
        next((layout for layout in layouts if layout.fits), layouts[-1])
        for ep_size in ep_sizes(config, cluster.world)
        for stage in ZERO_STAGES
        for layouts in [[_layout(config, cluster, ep_size, stage, batch) for batch in _divisors(images)[::-1]]]
    ]


def recommend(layouts: Sequence[PlannedLayout]) -> PlannedLayout:
    """Return the fastest layout that fits; of equals the one with fewer ranks per expert layer.

    Raises:
        UserError: none fits.
    """
    fitting = [layout for layout in layouts if layout.fits]
    if not fitting:
        least = min(layouts, key=lambda layout: layout.memory.total)
        raise UserError(
            f"no layout fits: the smallest takes {least.memory.total / GIB + RESERVED_GIB:.1f} GiB per GPU (ep_size "
            f"{least.ep_size}, ZeRO {least.zero_stage}, micro_batch {least.micro_batch}): take more or larger GPUs, "
            "train.activation_checkpointing=recompute, or a smaller model"
        )
    return min(fitting, key=lambda layout: (round(layout.seconds, 4), layout.ep_size, layout.zero_stage))


def ep_sizes(config: RunConfig, world: int) -> list[int]:
    """Return every ep_size that divides the world and the experts of every layer; without such layers, 1 alone."""
    layers = expert_layers(config.model)
    return [n for n in _divisors(world if layers else 1) if not any(layer.num_experts % n for layer in layers)]


def memory_per_rank(config: RunConfig, layout: Layout, stage: int, micro_batch: int, *, load: float = LOAD) -> Memory:
    """Return the memory of one rank.

    Stage 0 in fp32 steps on the weights themselves; otherwise there are fp32 masters. Stage 0 in bf16 keeps fp32 copies
    of the gradients for AdamW. Stages 1 and 2 divide masters and moments, stage 2 also gradients, over the ranks that
    hold the same weights.

    Args:
        config: sizes, precision, recomputation.
        layout: the ranks.
        stage: of ZeRO.
        micro_batch: images per rank and forward pass.
        load: see `model.activation_memory.activation_bytes`.
    """
    dense, experts = _parameters(config)
    own = dense + experts / layout.ep_size  # numbers on this rank
    parted = (dense + experts) / layout.world  # numbers that ZeRO leaves to this rank
    item = _item_bytes(config)
    if stage == 0:
        masters, gradients = (0.0, own * 4) if item == 4 else (own * 4, own * (item + 4))
        optimizer = masters + own * 8
    else:
        gradients = (own if stage == 1 else parted) * item + min(config.parallel.bucket_elements, own) * BUCKET_BYTES
        optimizer = parted * 12
    kept = activation_bytes(
        config.model,
        config.task_specs,
        config.data.image_size,
        pairs=pairs_per_image(config),
        item_bytes=item,
        ep_size=layout.ep_size,
        load=load,
        recompute=config.train.activation_checkpointing != "none",
    )
    if config.train.activation_checkpointing == "recompute_offload":
        kept = type(kept)(blocks=0.0, rest=kept.rest, largest_block=kept.largest_block)
    losses = loss_bytes(config.task_specs, config.data.image_size) * pairs_per_image(config) / len(config.task_specs)
    # In backward one block is worked on: its gradients are about as large as what it kept.
    per_image = kept.blocks + kept.rest + kept.largest_block + losses
    if config.train.activation_checkpointing != "none":
        per_image += kept.largest_block  # what the block keeps when it runs again
    present = present_weight_bytes(
        config.model,
        item_bytes=item,
        ep_size=layout.ep_size,
        shadowed=most_shadowed(config, layout.ep_size),
        recompute=config.train.activation_checkpointing != "none",
    )
    return Memory(
        weights=own * item + present,
        gradients=gradients,
        optimizer=optimizer,
        activations=micro_batch * per_image * PEAK,
    )


def traffic_per_rank(config: RunConfig, layout: Layout, stage: int) -> Traffic:
    """Return what one rank sends in one step; the arguments are those of `memory_per_rank`."""
    dense, experts = _parameters(config)
    holders = layout.world // layout.ep_size
    return Traffic(
        all_to_all=all_to_all_bytes(config, layout),
        experts=_reduction(experts / layout.ep_size, holders, stage, _item_bytes(config)),
        dense=_reduction(dense, layout.world, stage, _item_bytes(config)),
    )


def all_to_all_bytes(config: RunConfig, layout: Layout) -> float:
    """Return what one rank's tokens cause in one step: rows out and home, and their gradients; evenly drawn routing."""
    ranks, model = layout.ep_size, config.model
    images = config.train.images_per_step / layout.world
    tokens = (config.data.image_size // model.patch_size) ** 2
    total = 0.0
    for layer in expert_layers(model) if ranks > 1 else []:
        rows = tokens * images * (pairs_per_image(config) if layer.sees_task else 1)
        others = ranks_visited(layer.num_experts, layer.top_k, ranks) * (ranks - 1) / ranks
        slots = min(layer.top_k, layer.num_experts // ranks)
        numbers = others * (4 * model.width + 3 * slots)
        if layer.kind == "attention":
            numbers += 4 * layer.top_k * (ranks - 1) / ranks * model.attention_head_width
        total += rows * numbers * _item_bytes(config)
    return total


def most_shadowed(config: RunConfig, ep_size: int) -> int:
    """Return how many experts of a layer may be shadowed."""
    affine = config.parallel.expert_placement == "task_affine" and ep_size > 1
    return config.parallel.shadowed_experts if affine else 0


def pairs_per_image(config: RunConfig) -> int:
    """Return how many tasks each image serves in a step, at most."""
    return config.data.tasks_per_image or len(config.task_specs)


def _layout(config: RunConfig, cluster: Cluster, ep_size: int, stage: int, micro_batch: int) -> PlannedLayout:
    layout = Layout(cluster.world, ep_size)
    check_experts(config.model, ep_size)
    memory = memory_per_rank(config, layout, stage, micro_batch)
    traffic = traffic_per_rank(config, layout, stage)
    images = config.train.images_per_step // cluster.world
    return PlannedLayout(
        ep_size=ep_size,
        zero_stage=stage,
        micro_batch=micro_batch,
        accumulation=images // micro_batch,
        memory=memory,
        traffic=traffic,
        seconds=_seconds(config, cluster, layout, traffic, images),
        fits=memory.total <= (cluster.memory_gib - RESERVED_GIB) * GIB,
    )


def _seconds(config: RunConfig, cluster: Cluster, layout: Layout, traffic: Traffic, images: int) -> float:
    costs = model_costs(config.model, config.task_specs, config.data.image_size)
    macs = images * sum(row.macs * min(row.passes, pairs_per_image(config)) for row in costs)
    passes = 3 if config.train.activation_checkpointing == "none" else 4  # forward, twice as much backward, again
    at_home = layout.ep_size <= cluster.gpus_per_node and cluster.gpus_per_node % layout.ep_size == 0
    exchange = traffic.all_to_all / (cluster.bandwidth if at_home else cluster.network)
    # Rings over nodes are as slow as their slowest link.
    reduction = (traffic.experts + traffic.dense) / (cluster.bandwidth if cluster.nodes == 1 else cluster.network)
    return 2 * macs * passes / (cluster.flops * EFFICIENCY) + exchange + reduction


def _reduction(numbers: float, ranks: int, stage: int, item_bytes: int) -> float:
    """Gradients travel in fp32: an all-reduce, or with ZeRO to the rank that updates, and weights back."""
    back = 4 if stage == 0 else item_bytes
    return numbers * (ranks - 1) / ranks * (4 + back)


def _parameters(config: RunConfig) -> tuple[int, int]:
    """Numbers that every rank holds, and those of all experts."""
    count = count_parameters(config.model, config.task_specs, config.data.image_size)
    return count.total - count.experts, count.experts


def _item_bytes(config: RunConfig) -> int:
    return 2 if config.train.dtype == "bf16" else 4


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
