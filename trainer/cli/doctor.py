"""`modsquad doctor`: checks of this machine, of ranks on it, and of a SLURM cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cluster.doctor import Finding


def doctor(
    run_folder: Annotated[Path, typer.Option(help="Where runs will be written.")] = Path("runs"),
    ranks: Annotated[int, typer.Option(min=1, help="Processes that meet on this machine.")] = 2,
    slurm: Annotated[bool, typer.Option("--slurm", help="Let ranks meet on nodes of the cluster instead.")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes, with --slurm.")] = 2,
    partition: Annotated[str | None, typer.Option(help="Partition, with --slurm.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs to ask for, a rank for each, with --slurm.")] = 0,
    minutes: Annotated[int, typer.Option(min=1, help="Longest wait for the nodes, with --slurm.")] = 10,
) -> None:
    """Check that this machine, or this cluster, is fit to train; every line says what to do. Status 2: it is not."""
    from cluster.doctor import check_machine
    from cluster.doctor_start import check_local_ranks, check_slurm_ranks

    findings = list(check_machine(run_folder))
    if slurm:
        findings += check_slurm_ranks(
            run_folder, nodes=nodes, partition=partition, minutes=minutes, gpus_per_node=gpus_per_node
        )
    else:
        findings += check_local_ranks(run_folder, ranks)
    Console().print(_table(findings))
    if any(finding.verdict == "bad" for finding in findings):
        sys.exit(2)


def _table(findings: list[Finding]) -> Table:
    colours = {"good": "green", "warning": "yellow", "bad": "red"}
    table = Table("check", "", "found", "what to do")
    for finding in findings:
        verdict = Text(finding.verdict, colours[finding.verdict])
        table.add_row(finding.check, verdict, Text(finding.found), Text(finding.advice))
    return table
