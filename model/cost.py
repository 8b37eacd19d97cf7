"""What a model costs: parameters and multiply-accumulates, part by part, counted from its configuration.

`FORMULAE` says what each part costs, and every number is a sum of those. A multiply-accumulate (MAC) is one product and
one sum; only matrix products are counted, as is usual for the published numbers. A part runs once per image, or, if its
input depends on the task, once per (image, task) pair. Extraction lowers T and R to the squad's tasks and E to the kept
experts, except in the router, which keeps its full width; MACs stay, as every token still uses K experts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from configs.schema import ModelConfig
from configs.tasks import TaskSpec
from model.vit import Kept, block_layers

SYMBOLS = {
    "N": "patch tokens",
    "D": "width",
    "p": "patch side",
    "E": "experts of a layer",
    "K": "experts per token",
    "d": "head width",
    "h": "heads of dense attention",
    "H": "hidden width of an expert",
    "G": "hidden width of a dense MLP",
    "R": "routers of a layer: one, or one per task",
    "T": "tasks",
    "C": "channels of a task",
}

Purpose = Literal["dense", "experts", "routers", "tasks"]


@dataclass(frozen=True)
class Formula:
    """The cost of one part: sums of products of `SYMBOLS`, such as "3 p^2 D + D".

    Attributes:
        purpose: what its parameters count as.
        parameters: parameters.
        macs: multiply-accumulates of one image or pair.
    """

    purpose: Purpose
    parameters: str
    macs: str


FORMULAE = {
    "patch embedding": Formula("dense", "3 p^2 D + D", "3 p^2 D N"),
    "positions": Formula("dense", "N D", "0"),
    "task embedding": Formula("tasks", "T D", "0"),
    "norms": Formula("dense", "4 D", "0"),
    "router": Formula("routers", "R D E", "D E N"),
    "router noise": Formula("routers", "R D E", "0"),  # in training only
    "expert attention": Formula("experts", "2 E D d", "2 K D d N + 2 K d N^2"),
    "keys and values": Formula("dense", "2 D d + 2 d", "2 D d N"),  # of expert attention
    "dense attention": Formula("dense", "4 D h d + 3 h d + D", "4 D h d N + 2 h d N^2"),
    "expert MLP": Formula("experts", "2 E D H + E H + E D", "2 K D H N"),
    "dense MLP": Formula("dense", "2 D G + G + D", "2 D G N"),
    "dense head": Formula("tasks", "2 D + D p^2 C + p^2 C", "D p^2 C N"),
    "vector head": Formula("tasks", "2 D + D C + C", "D C"),
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Equal parts of a model and what they cost together.

    Attributes:
        part: their name in `FORMULAE`.
        count: how many there are.
        own: the symbols that are theirs, with their values; the others are those of the model.
        symbols: all symbols that their formulae need, with their values.
        passes: how often each of them runs for one image with all tasks.
    """

    part: str
    count: int
    own: Mapping[str, int]
    symbols: Mapping[str, int]
    passes: int

    @property
    def formula(self) -> Formula:
        """What one of them costs."""
        return FORMULAE[self.part]

    @property
    def parameters(self) -> int:
        """Parameters."""
        return self.count * evaluate(self.formula.parameters, self.symbols)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses: K experts of E, its own position."""
        experts = self.symbols.get("K", self.symbols.get("E", 0))
        return self.count * evaluate(self.formula.parameters, {**self.symbols, "E": experts, "N": 1})

    @property
    def macs(self) -> int:
        """MACs of one pass through each of them."""
        return self.count * evaluate(self.formula.macs, self.symbols)


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


def model_costs(
    config: ModelConfig, tasks: Sequence[TaskSpec], image_size: int, *, kept: Kept | None = None
) -> list[Cost]:
    """Return the parts of a model over all ranks, in the order of `FORMULAE`; equal parts are one row.

    Args:
        config: sizes.
        tasks: the tasks that it serves.
        image_size: side of the square input in pixels.
        kept: experts that each expert layer holds; None: all.
    """
    shared = model_symbols(config, len(tasks), image_size)
    counted = Counter(_parts(config, tasks, kept or {}))
    rows = [
        Cost(part=part, count=count, own=dict(own), symbols=shared | dict(own), passes=len(tasks) if per_pair else 1)
        for (part, per_pair, own), count in counted.items()
    ]
    return sorted(rows, key=lambda row: list(FORMULAE).index(row.part))


def count_parameters(
    config: ModelConfig, tasks: Sequence[TaskSpec], image_size: int, *, kept: Kept | None = None
) -> ParameterCount:
    """Return the parameters of a model, over all ranks; arguments as in `model_costs`."""
    by_purpose: dict[Purpose, int] = {"dense": 0, "experts": 0, "routers": 0, "tasks": 0}
    for row in model_costs(config, tasks, image_size, kept=kept):
        by_purpose[row.formula.purpose] += row.parameters
    return ParameterCount(**by_purpose)


def count_expert_parameters(config: ModelConfig, kind: Literal["attention", "mlp"]) -> int:
    """Return the parameters of one expert of a kind."""
    part = FORMULAE["expert attention" if kind == "attention" else "expert MLP"]
    return evaluate(part.parameters, model_symbols(config, 1, config.patch_size) | {"E": 1})


def count_macs(config: ModelConfig, task: TaskSpec, image_size: int) -> int:
    """Return the MACs that one image costs for one task, from pixels to prediction; the same before and after
    extraction.

    Args:
        config: sizes.
        task: the task.
        image_size: side of the square input in pixels.
    """
    return sum(row.macs for row in model_costs(config, [task], image_size))


def count_image_macs(config: ModelConfig, tasks: Sequence[TaskSpec], image_size: int) -> int:
    """Return the MACs that one image costs for all tasks together: what sees no task runs once; arguments as above."""
    return sum(row.macs * row.passes for row in model_costs(config, tasks, image_size))


def count_active_parameters(config: ModelConfig, task: TaskSpec, image_size: int) -> int:
    """Return the parameters that one token uses for one task; arguments as in `count_macs`."""
    return sum(row.active_parameters for row in model_costs(config, [task], image_size))


def model_symbols(config: ModelConfig, num_tasks: int, image_size: int) -> dict[str, int]:
    """Return the values of the symbols that all parts of a model share."""
    return {
        "N": (image_size // config.patch_size) ** 2,
        "D": config.width,
        "p": config.patch_size,
        "d": config.attention_head_width,
        "h": config.heads,
        "H": config.expert_hidden,
        "G": config.dense_hidden,
        "T": num_tasks,
    }


def evaluate(formula: str, symbols: Mapping[str, int]) -> int:
    """Return the value of a formula: terms between " + ", each a product of numbers and symbols, some with a power."""
    return sum(prod(_factor(factor, symbols) for factor in term.split()) for term in formula.split(" + "))


def _factor(text: str, symbols: Mapping[str, int]) -> int:
    base, _, power = text.partition("^")
    value = int(base) if base.isdigit() else symbols[base]
    return prod([value] * int(power or 1))


_Part = tuple[str, bool, tuple[tuple[str, int], ...]]
"""Name in `FORMULAE`, whether it runs once per pair and not per image, and the symbols of its own."""


def _parts(config: ModelConfig, tasks: Sequence[TaskSpec], kept: Kept) -> Iterator[_Part]:
    """Yield every part of a model."""
    yield "patch embedding", False, ()
    yield "positions", False, ()
    if config.task_embedding != "none":
        yield "task embedding", False, ()
    for index in range(config.depth):
        yield from _block(config, index, len(tasks), kept)
    for spec in tasks:
        yield "dense head" if spec.dense else "vector head", False, (("C", spec.channels),)


def _block(config: ModelConfig, index: int, num_tasks: int, kept: Kept) -> Iterator[_Part]:
    per_pair = index >= config.shared_blocks
    layers = {layer.kind: layer for layer in block_layers(config, index)}
    yield "norms", per_pair, ()
    if "attention" in layers:
        yield "keys and values", per_pair, ()
    else:
        yield "dense attention", per_pair, ()
    if "mlp" not in layers:
        yield "dense MLP", per_pair, ()
    for layer in layers.values():
        routers = num_tasks if layer.sees_task and config.routers == "task" else 1
        router = (("E", layer.num_experts), ("R", routers))
        yield "router", per_pair, router
        if config.router_noise:
            yield "router noise", per_pair, router
        held = len(kept[layer.name]) if layer.name in kept else layer.num_experts
        experts = (("E", held), ("K", layer.top_k))
        yield "expert attention" if layer.kind == "attention" else "expert MLP", per_pair, experts
