"""The benchmark as a whole: its parts in order, and bench.json."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from configs.atomic import write_text_atomically
from trainer.bench.communication import compare_communication
from trainer.bench.comparison import Comparison, Settings
from trainer.bench.data_reading import compare_data
from trainer.bench.expert_layers import compare_attention, compare_mlp
from trainer.bench.limits import Verdict, judge
from trainer.bench.machine import describe_machine
from trainer.bench.plan_scale import compare_plan
from trainer.bench.scaling import compare_scaling
from trainer.bench.squads import compare_squads
from trainer.bench.training_step import compare_step

FORMAT_VERSION = 1

PARTS: dict[str, Callable[[Settings, str], list[Comparison]]] = {
    "mlp": compare_mlp,
    "attention": compare_attention,
    "step": compare_step,
    "scaling": compare_scaling,
    "squads": compare_squads,
    "comm": compare_communication,
    "plan": compare_plan,
    "data": compare_data,
}
"""Name -> measures one part in one precision."""


def run_parts(names: Sequence[str], dtypes: Sequence[str], settings: Settings) -> Iterator[Comparison]:
    """Measure parts and yield each comparison as soon as it is there.

    Args:
        names: keys of `PARTS`.
        dtypes: fp32, bf16.
        settings: sizes, rounds and threads; torch's number of threads is set.
    """
    torch.set_num_threads(settings.threads)
    for name in names:
        for dtype in dtypes:
            torch.manual_seed(0)
            yield from PARTS[name](settings, dtype)


def verdicts(comparisons: Sequence[Comparison], settings: Settings) -> list[Verdict]:
    """Return a verdict for every limit; small sizes say nothing about any of them."""
    return judge([] if settings.quick else comparisons)


def write_results(path: Path, comparisons: Sequence[Comparison], settings: Settings) -> None:
    """Write what was measured, on what, and the limits with their verdicts, as JSON."""
    results = {
        "version": FORMAT_VERSION,
        "machine": describe_machine(),
        "settings": {**dataclasses.asdict(settings), "run": settings.run and str(settings.run)},
        "comparisons": [dataclasses.asdict(comparison) for comparison in comparisons],
        "limits": [
            {**dataclasses.asdict(verdict.limit), "measured": verdict.measured, "met": verdict.met}
            for verdict in verdicts(comparisons, settings)
        ],
    }
    write_text_atomically(path, json.dumps(results, indent=1) + "\n")
