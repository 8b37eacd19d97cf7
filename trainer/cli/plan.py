"""`modsquad plan`: which layouts of a run fit on a cluster, and what they move."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from trainer.terminal import say

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from trainer.footprint.plan import Cluster, PlannedLayout


def plan(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted overrides: key.sub=value.", show_default=False)
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each.")] = 8,
    gpu_memory_gib: Annotated[float, typer.Option(min=1, help="Memory of a GPU.")] = 80.0,
    bandwidth: Annotated[float, typer.Option(min=0.01, help="GB/s that a GPU sends within its node.")] = 300.0,
    network: Annotated[float, typer.Option(min=0.01, help="GB/s that a GPU sends to other nodes.")] = 25.0,
    routing: Annotated[
        Path | None,
        typer.Option(
            help="Run folder: also show the bytes of task-affine placement for how its tasks used experts.",
            show_default=False,
        ),
    ] = None,
    tflops: Annotated[float, typer.Option(min=0.01, help="Peak TFLOP/s of a GPU in the run's precision.")] = 400.0,
) -> None:
    """Show memory per GPU and bytes per step of every layout, and recommend one; starts nothing."""
    from trainer.footprint.plan import Cluster, plan_layouts, recommend
    from trainer.recipes import load_recipe

    run = load_recipe(config, overrides or [])
    cluster = Cluster(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        memory_gib=gpu_memory_gib,
        bandwidth=bandwidth * 1e9,
        network=network * 1e9,
        flops=tflops * 1e12,
    )
    layouts = plan_layouts(run, cluster)
    affine = _affine_megabytes(run, cluster, layouts, routing) if routing else {}
    console = Console()
    console.print(_layout_table(layouts, cluster))
    best = recommend(layouts)
    replicated = next(layout for layout in layouts if layout.ep_size == 1 and layout.zero_stage == best.zero_stage)
    sharded = [layout for layout in layouts if layout.ep_size > 1 and layout.zero_stage == best.zero_stage]
    lines = [
        f"replicated experts (ep_size 1): {replicated.traffic.experts / 1e6:,.1f} MB per GPU and step to reduce them",
        *(
            f"ep_size {layout.ep_size}: {layout.traffic.all_to_all / 1e6:,.1f} MB of all-to-all"
            f"{affine.get(layout.ep_size, '')}, {layout.traffic.experts / 1e6:,.1f} MB to reduce experts"
            for layout in sharded
        ),
        f"recommended: parallel.ep_size={best.ep_size} parallel.zero_stage={best.zero_stage} "
        f"train.micro_batch={best.micro_batch}",
    ]
    say("\n".join(lines), console=console)


def _affine_megabytes(
    run: "RunConfig", cluster: "Cluster", layouts: "Sequence[PlannedLayout]", routing: Path
) -> dict[int, str]:
    """Return for each ep_size what task-affine placement would move.

    Raises:
        UserError: no routing in the folder, or that of other tasks or layers.
    """
    from configs.errors import UserError
    from model.vit import expert_layers
    from trainer.distributed.affine_placement import expected_exchange
    from trainer.run_files import read_latest_ledger

    if (found := read_latest_ledger(routing)) is None:
        raise UserError(f"{routing} has no routing ledger: evaluate the run first (modsquad evaluate {routing})")
    ledger = found[1]
    tasks = tuple(spec.name for spec in run.task_specs)
    if list(ledger.layers) != expert_layers(run.model) or tuple(ledger.tasks) != tasks:
        raise UserError(f"the tasks or expert layers of {routing} are not those of the planned run")
    images = run.train.images_per_step // cluster.world
    return {
        ep_size: f" ({expected_exchange(run, ledger, ep_size, images) / 1e6:,.1f} MB task-affine)"
        for ep_size in {layout.ep_size for layout in layouts} - {1}
    }


def _layout_table(layouts: "Sequence[PlannedLayout]", cluster: "Cluster") -> Table:
    from trainer.footprint.plan import GIB, LOAD, RESERVED_GIB

    gpus = f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.memory_gib:g} GiB"
    table = Table(
        title=f"{gpus}: GiB per GPU, MB that it sends in a step",
        title_justify="left",
        caption=f"activations with {LOAD:g} times an even share of tokens at the experts; {RESERVED_GIB:g} GiB of a "
        "GPU left to the system; s: compute and bytes one after the other",
        caption_justify="left",
        box=None,  # twelve columns in eighty characters
        padding=(0, 1, 0, 0),
    )
    for column in (
        "ep",
        "ZeRO",
        "micro",
        "weights",
        "grads",
        "optim",
        "activ",
        "total",
        "all-to-all",
        "experts",
        "dense",
        "s",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for layout in layouts:
        memory, traffic = layout.memory, layout.traffic
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        table.add_row(
            str(layout.ep_size),
            str(layout.zero_stage),
            f"{layout.micro_batch}x{layout.accumulation}",
            *(f"{size / GIB:.1f}" for size in sizes),
            *(f"{count / 1e6:.0f}" for count in (traffic.all_to_all, traffic.experts, traffic.dense)),
            f"{layout.seconds:.3f}",
            "" if layout.fits else "[red]no",
        )
    return table
